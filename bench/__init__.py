"""Measurements of FastAgg beside what its users would otherwise write.

``python -m bench.run`` runs them all, prints tables and writes a record. Every baseline runs in the
same process and the same minutes; times are medians of interleaved repetitions.
"""
