"""How large the demo is: the full run of ``make demo`` and the quick one of the tests."""

from __future__ import annotations

from dataclasses import dataclass

from fastagg.federated.clients.llama import Shape, Training

METHODS = ("flora", "flexlora", "fedit", "zeropad", "hetlora")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Settings:
    """Sizes of one run.

    ranks: of the clients; each trains with alpha = 2 rank, as in FLoRA's experiments.
    length: bytes in a window, of training and of held-out text.
    held_out_windows: per client.
    """

    shape: Shape
    pre_training: Training
    fine_tuning: Training
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    length: int
    held_out_windows: int


# FLoRA's ten clients; the ranks sum to 160, below the model's width, so that the exact update has
# room to be of a higher rank than any client's adapter.
FULL = Settings(
    shape=Shape(hidden=192, feed_forward=512, layers=3, heads=6),
    pre_training=Training(steps=300, batch=8, learning_rate=3e-3),
    fine_tuning=Training(steps=32, batch=8, learning_rate=5e-3),
    ranks=(64, 32, 16, 16, 8, 8, 4, 4, 4, 4),
    targets=ALL_PROJECTIONS,
    length=192,
    held_out_windows=16,
)

QUICK = Settings(
    shape=Shape(hidden=48, feed_forward=64, layers=2, heads=4),
    pre_training=Training(steps=100, batch=16, learning_rate=1e-2),
    fine_tuning=Training(steps=40, batch=16, learning_rate=5e-3),
    ranks=(12, 6, 3),
    targets=ALL_PROJECTIONS,
    length=64,
    held_out_windows=8,
)
