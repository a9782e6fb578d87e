"""FastAgg in Flower: strategies for the server, and what a ClientApp reads and answers.

    from fastagg.engines.flower import FastAggStrategy

    strategy = FastAggStrategy("flexlora", initial="fresh-adapter", folder="rounds")
    strategy.start(grid, num_rounds=3)

Each node gets an adapter of its own, at its own rank, and its answer is folded in as it arrives.
"""

from fastagg.engines.versions import require

require(
    "flwr",
    [
        "flwr.app:Array",
        "flwr.app:ArrayRecord",
        "flwr.app:ConfigRecord",
        "flwr.app:Message",
        "flwr.app:MetricRecord",
        "flwr.app:RecordDict",
        "flwr.common:FitIns",
        "flwr.common:FitRes",
        "flwr.common:Parameters",
        "flwr.server.strategy:FedAvg",
        "flwr.serverapp:Grid",
        "flwr.serverapp.strategy:FedAvg",
        "flwr.serverapp.strategy:Result",
    ],
    since="1.41",
    below="1.43",
    extra="flower",
)

# They import flwr, of which the versions that work are named above.
from fastagg.engines.flower.client import (  # noqa: E402
    Received,
    evaluate_reply,
    query_reply,
    receive,
    train_reply,
)
from fastagg.engines.flower.codec import decode, encode  # noqa: E402
from fastagg.engines.flower.legacy import FastAggFedAvg  # noqa: E402
from fastagg.engines.flower.legacy_client import fit_result, receive_arrays  # noqa: E402
from fastagg.engines.flower.strategy import FastAggStrategy  # noqa: E402

__all__ = [
    "FastAggFedAvg",
    "FastAggStrategy",
    "Received",
    "decode",
    "encode",
    "evaluate_reply",
    "fit_result",
    "query_reply",
    "receive",
    "receive_arrays",
    "train_reply",
]
