"""What a round adds up in, chosen by the memory it needs."""

from fastagg.accumulators.dense import DenseAccumulator, DenseSource
from fastagg.accumulators.joining import Accumulator, join
from fastagg.accumulators.means import MeanAccumulator, MeanSource
from fastagg.accumulators.source import Chunk, Source, WholeAverages
from fastagg.accumulators.stack import StackAccumulator, StackSource

__all__ = [
    "Accumulator",
    "Chunk",
    "DenseAccumulator",
    "DenseSource",
    "MeanAccumulator",
    "MeanSource",
    "Source",
    "StackAccumulator",
    "StackSource",
    "WholeAverages",
    "join",
]
