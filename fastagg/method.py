"""A published method is three choices: weights, accumulator and hand-out."""

from __future__ import annotations

from dataclasses import dataclass

from fastagg.errors import InvalidInput
from fastagg.handouts.choices import Handout
from fastagg.weighting import Weighting

__all__ = ["Method"]


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: what users call it.
        paper: title and venue;  arxiv: its number.
        equation: what the server computes, in one line.
        weights: what each client counts for in each module.
        accumulators: the kinds that can hold its state: "stack" and "dense", or "means".
        handout: what the clients get.
        equal_ranks: all clients must have the same rank in a module.
    """

    name: str
    paper: str
    arxiv: str
    equation: str
    weights: Weighting
    accumulators: tuple[str, ...]
    handout: Handout
    equal_ranks: bool = False

    def check_accumulator(self, kind: str) -> None:
        """Whether a user may ask for this accumulator.

        Raises:
            InvalidInput: the method cannot use it.
        """
        if kind == "auto" or kind in self.accumulators:
            return
        reasons: dict[tuple[str, ...], str] = {
            ("stack",): "it hands out the clients' own factors, which dW does not keep",
            ("means",): "it averages the factors, for which running sums are enough",
        }
        usable = [repr(other) for other in ("auto", *self.accumulators) if other != "means"]
        raise InvalidInput(
            f"method {self.name} cannot use this accumulator: "
            f"{reasons.get(self.accumulators, 'it keeps another state')}",
            field="accumulator",
            expected=" or ".join(usable),
            got=repr(kind),
        )

    def check_condensing(self) -> None:
        """Whether clients' adapters may be replaced by a truncation of their weighted sum.

        Raises:
            InvalidInput: what the method hands out does not follow from dW.
        """
        if "stack" not in self.accumulators:
            raise InvalidInput(
                f"method {self.name} averages the factors: its sums do not grow with the clients, and "
                "they are no product that could be truncated",
                field="condense",
                expected="flexlora, or another method that truncates dW",
                got=self.name,
                cure="Send the state as it is",
            )
        if not self.handout.ranked:
            raise InvalidInput(
                f"method {self.name} hands out the clients' own factors, which a truncation drops",
                field="condense",
                expected="flexlora, or another method that truncates dW",
                got=self.name,
                cure="Merge the states as they are, which is exact, or aggregate with method flexlora",
            )
