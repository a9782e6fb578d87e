"""ops.redistribute and redistribute_ on CUDA: every test of the CPU ops."""

from test_ops_redistribute import *  # noqa: F403

del test_into_a_mapped_file  # noqa: F821  a GPU does not write to a file
