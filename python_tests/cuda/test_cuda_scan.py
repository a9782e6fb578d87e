"""ops.scan on CUDA: every test of the CPU op."""

from test_ops_scan import *  # noqa: F403
