"""FastAgg at home in other federated codebases: each module fits one codebase's own hooks.

    from fastagg.engines.flower import FastAggStrategy
    from fastagg.engines import openfedllm

Each turns the codebase's records into updates, wraps :class:`fastagg.Aggregator`, and turns the result
back. Importing this imports none of the codebases, and a module imports its own only where it cannot do
without: a hook that is called by name and signature needs no base class.
"""
