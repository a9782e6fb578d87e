"""The errors that FastAgg raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FastAggError", "InvalidInput", "MemoryBudgetExceeded", "RankLost"]


class FastAggError(Exception):
    """Base class of every error that FastAgg raises on purpose."""


class InvalidInput(FastAggError, ValueError):
    """An adapter, a weight or an option that cannot be aggregated.

    Args:
        problem: what is wrong, without a full stop.
        client: the client (or folder name) whose update it is.
        module: the module, as the base model names it.
        field: the field of the configuration, the tensor key or the argument.
        expected: what would have been right.
        got: what came instead.
        cure: what to do about it.

    All of them stay readable as attributes; ``str()`` is one or two sentences that name all given.
    """

    def __init__(
        self,
        problem: str,
        *,
        client: str | None = None,
        module: str | None = None,
        field: str | None = None,
        expected: object = None,
        got: object = None,
        cure: str | None = None,
    ) -> None:
        self.problem = problem
        self.client = client
        self.module = module
        self.field = field
        self.expected = expected
        self.got = got
        self.cure = cure
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        named = (("client", self.client), ("module", self.module), ("field", self.field))
        where = ", ".join(f"{label} {value!r}" for label, value in named if value is not None)
        text = f"{where}: {self.problem}" if where else self.problem
        values = (("expected", self.expected), ("got", self.got))
        compared = ", ".join(f"{label} {value}" for label, value in values if value is not None)
        if compared:
            text += f" ({compared})"
        return f"{text}. {self.cure}" if self.cure else text

    def for_client(self, client: str) -> InvalidInput:
        """The same error under another client's name: a folder may be loaded before it is named."""
        return type(self)(
            self.problem,
            client=client,
            module=self.module,
            field=self.field,
            expected=self.expected,
            got=self.got,
            cure=self.cure,
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, dict(self.__dict__)))


def _rebuild(cls: type[InvalidInput], problem: str, fields: dict[str, object]) -> InvalidInput:
    error = cls(problem)
    error.__dict__.update(fields)
    error.args = (error._sentence(),)
    return error


class MemoryBudgetExceeded(FastAggError, MemoryError):
    """The work would need more memory than the budget allows; raised before any work.

    Args:
        message: one sentence, with both figures in it.
        needed: bytes that the work would need.
        budget: bytes that it was allowed.
    """

    def __init__(self, message: str, *, needed: int, budget: int) -> None:
        self.needed = needed
        self.budget = budget
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_budget, (str(self), self.needed, self.budget))


def _rebuild_budget(message: str, needed: int, budget: int) -> MemoryBudgetExceeded:
    return MemoryBudgetExceeded(message, needed=needed, budget=budget)


class RankLost(FastAggError):
    """A process of the group did not come to where the others wait: the job is at its end.

    Args:
        ranks: those that are missing, as far as that can be told, by their numbers in the group.
        reason: how it was noticed.
    """

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        self.ranks = tuple(ranks)
        self.reason = reason
        named = ", ".join(map(str, self.ranks)) or "of the group (unknown which)"
        super().__init__(
            f"rank{'s' if len(self.ranks) > 1 else ''} {named} did not come: {reason}. Nothing was "
            "written; start the job again"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (RankLost, (self.ranks, self.reason))


def short(value: object) -> str:
    """The ``repr`` of a value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
