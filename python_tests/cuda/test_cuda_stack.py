"""ops.stack and stack_ on CUDA: every test of the CPU ops."""

from test_ops_stack import *  # noqa: F403

del test_slabs_that_are_written_past_the_caches  # noqa: F821  about the CPU's stores and threads
