"""ops.gram and update_gram on CUDA: every test of the CPU ops."""

from test_ops_gram import *  # noqa: F403
