"""Merging delta weights into a model's checkpoint, shard by shard, no model instantiated."""

from fastagg.checkpoint.merge import MergeReport, merge_into_checkpoint
from fastagg.checkpoint.targets import Change

__all__ = ["Change", "MergeReport", "merge_into_checkpoint"]
