"""Builds fastagg/_cuda: what torch offers for that refuses where torch itself has no CUDA."""
