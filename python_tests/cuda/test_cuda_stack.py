"""ops.stack and stack_ on CUDA: every test of the CPU ops."""

from test_ops_stack import *  # noqa: F403
