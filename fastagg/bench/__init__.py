"""`fastagg bench`: every op beside what its users would write, and beside what the machine can do.

    cases -> workload -> operations (ours, baselines, limits) -> measure -> record -> tables, plots

No speed without its error: each row has both. How it is measured: :mod:`fastagg.bench.measure`.
"""
