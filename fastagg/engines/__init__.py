"""FastAgg inside other federated codebases: Flower, NVFlare, and shims for the hooks of others.

Each integration turns its framework's records into updates, wraps :class:`fastagg.Aggregator`, and turns
the result back. None is imported, nor its framework, unless it is used:

    from fastagg.engines.flower import FastAggStrategy
"""
