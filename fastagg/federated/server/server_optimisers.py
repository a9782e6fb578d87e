"""Server optimisers: the aggregate as a pseudo-gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated Optimization.
ICLR 2021, arXiv 2003.00295. FedAvgM: Hsu, Qi, Brown, arXiv 1909.06335.

Let x be what the server holds and D = (what the clients' average is) - x, the pseudo-gradient; then
x becomes x + change, element by element:

    FedAvg    change = D
    FedAvgM   m = beta m + D                             change = eta m
    FedAdam   m = beta_1 m + (1 - beta_1) D
              v = beta_2 v + (1 - beta_2) D^2            change = eta m / (sqrt(v) + tau)
    FedYogi   v = v - (1 - beta_2) D^2 sign(v - D^2)     m and the change as FedAdam's

with m = 0 and v = tau^2 in the beginning and, as in the paper, no correction of the bias. The learning
rates are the server's; tau is the size of an element of D below which it is not normalised, so both
are to be chosen for the size of the updates at hand.

An optimiser here is its hyperparameters and its equation; what it remembers of each module is kept
by whoever calls it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from fastagg.errors import InvalidInput, short

__all__ = ["OPTIMISERS", "FedAdam", "FedAvg", "FedAvgM", "FedYogi", "Moments", "ServerOptimiser"]

Moments = Mapping[str, torch.Tensor]
"""What an optimiser remembers of one module: tensors like the pseudo-gradient, by name."""


class ServerOptimiser(Protocol):
    """How a pseudo-gradient becomes a change of the server's model.

    Attributes:
        dense: it has to see dense pseudo-gradients; otherwise the change is the pseudo-gradient
            itself, and an aggregate can stay in its factors.
    """

    dense: ClassVar[bool]

    def step(
        self, gradient: torch.Tensor, moments: Moments
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step for one module.

        Args:
            gradient: the pseudo-gradient, of any shape, float32 as a rule.
            moments: what the module's step before returned; empty at its first.

        Returns:
            The change and the new moments; the arguments are left as they are.
        """


@dataclass(frozen=True)
class FedAvg:
    """The identity: the server's model becomes the aggregate (McMahan et al., arXiv 1602.05629)."""

    dense: ClassVar[bool] = False

    def step(
        self, gradient: torch.Tensor, moments: Moments
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The pseudo-gradient itself."""
        return gradient, {}


@dataclass(frozen=True)
class FedAvgM:
    """Momentum on the server.

    Args:
        learning_rate: eta, > 0.
        momentum: beta, in [0, 1).

    Raises:
        InvalidInput: a value out of its range.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9

    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_share("momentum", self.momentum)

    def step(
        self, gradient: torch.Tensor, moments: Moments
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """m = beta m + D; change = eta m."""
        m = gradient.clone()
        if moments:
            m.add_(moments["m"], alpha=self.momentum)
        return self.learning_rate * m, {"m": m}


@dataclass(frozen=True)
class FedAdam:
    """Adam on the server.

    Args:
        learning_rate: eta, > 0.
        beta1, beta2: in [0, 1).
        tau: the degree of adaptivity, > 0.

    Raises:
        InvalidInput: a value out of its range.
    """

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_share("beta1", self.beta1)
        _check_share("beta2", self.beta2)
        _check_positive("tau", self.tau)

    def step(
        self, gradient: torch.Tensor, moments: Moments
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The new m and v; change = eta m / (sqrt(v) + tau)."""
        if not moments:
            moments = {
                "m": torch.zeros_like(gradient),
                "v": torch.full_like(gradient, self.tau**2),
            }
        m = self.beta1 * moments["m"] + (1 - self.beta1) * gradient
        v = self._second_moment(moments["v"], gradient.square())
        return self.learning_rate * m / (v.sqrt() + self.tau), {"m": m, "v": v}

    def _second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """Yogi on the server: v moves towards D^2 by an amount that does not depend on v.

    Args and errors: those of :class:`FedAdam`.
    """

    def _second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)


OPTIMISERS: Mapping[str, type[FedAvg] | type[FedAvgM] | type[FedAdam] | type[FedYogi]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}
"""The optimisers by the names that users give them."""


def _check_positive(field: str, value: float) -> None:
    if not (_is_number(value) and math.isfinite(value) and value > 0):
        raise InvalidInput(
            "the server's optimiser cannot use this value",
            field=field,
            expected="a finite number > 0",
            got=short(value),
        )


def _check_share(field: str, value: float) -> None:
    if not (_is_number(value) and 0 <= value < 1):
        raise InvalidInput(
            "the server's optimiser cannot use this value",
            field=field,
            expected="a number in [0, 1)",
            got=short(value),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
