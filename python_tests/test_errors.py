"""The errors: one sentence that names all, and nothing lost between processes."""

from __future__ import annotations

import pickle

from fastagg.errors import FastAggError, InvalidInput, MemoryBudgetExceeded, short


def test_everything_given_is_named() -> None:
    error = InvalidInput(
        "the ranks differ",
        client="c7",
        module="q_proj",
        field="r",
        expected=8,
        got=4,
        cure="Save it again",
    )
    text = "client 'c7', module 'q_proj', field 'r': the ranks differ (expected 8, got 4). "
    assert str(error) == text + "Save it again"
    assert (error.client, error.module, error.field) == ("c7", "q_proj", "r")
    assert (error.expected, error.got, error.cure) == (8, 4, "Save it again")


def test_nothing_else_is_named() -> None:
    assert str(InvalidInput("no clients")) == "no clients"
    assert str(InvalidInput("bad", got=0)) == "bad (got 0)"


def test_another_clients_name() -> None:
    error = InvalidInput("bad", client="folder", module="m", got=False, cure="c").for_client("id")
    assert str(error) == "client 'id', module 'm': bad (got False). c"


def test_errors_survive_pickling() -> None:
    error = InvalidInput("bad", client="c7", module="m", cure="c")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.problem, again.client, again.module) == ("bad", "c7", "m")
    budget = pickle.loads(pickle.dumps(MemoryBudgetExceeded("too much", needed=9, budget=4)))
    assert (str(budget), budget.needed, budget.budget) == ("too much", 9, 4)
    assert isinstance(budget, MemoryError)
    assert isinstance(budget, FastAggError)


def test_long_values_are_cut() -> None:
    assert short("x") == "'x'"
    assert len(short("x" * 1000)) == 60
