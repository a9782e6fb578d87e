"""A server saved and loaded goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equations import client, one_thread  # noqa: F401
from server_rounds import MODULES, RANKS, assert_same_hand_outs, fresh, play, trained

from fastagg import methods
from fastagg.errors import InvalidInput
from fastagg.federated.server.server import Server
from fastagg.federated.server.server_optimisers import FedAdam, FedAvgM, FedYogi, ServerOptimiser

OPTIMISERS: dict[str, ServerOptimiser | None] = {
    "none": None,
    "fedavgm": FedAvgM(),
    "fedadam": FedAdam(),
    "fedyogi": FedYogi(),
}
ROUNDS = ("abc", "de", "b", "abcde")


def made(method: str, optimiser: str = "none", **options: Any) -> Server:
    ranks = dict.fromkeys(RANKS, 4) if method == "fedit" else RANKS
    return Server(method, fresh(ranks), optimiser=OPTIMISERS[optimiser], **options)


def played(server: Server, seed: int, rounds: range) -> Server:
    ranks = dict.fromkeys(RANKS, 4) if server.method.name == "fedit" else RANKS
    for number in rounds:
        play(server, trained(seed + 10 * number, ranks, ROUNDS[number]))
    return server


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("method", methods.names())
def test_a_run_resumed_has_the_bits_of_a_run_never_interrupted(
    seed: int, method: str, optimiser: str, tmp_path: Path
) -> None:
    straight = played(made(method, optimiser), seed, range(4))
    for stop in range(5):
        file = tmp_path / "server.safetensors"
        played(made(method, optimiser), seed, range(stop)).save(file)
        resumed = made(method, optimiser)
        resumed.load(file)
        assert resumed.round == stop + 1
        assert_same_hand_outs(played(resumed, seed, range(stop, 4)), straight)
    assert [path.name for path in tmp_path.iterdir()] == ["server.safetensors"]


@pytest.mark.parametrize("method", ["flexlora", "flora", "zeropad"])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"missing": "zero"}])
def test_a_state_dict_does_as_well(seed: int, method: str, options: dict[str, str]) -> None:
    straight = played(made(method, "none", **options), seed, range(4))
    state = played(made(method, "none", **options), seed, range(2)).state_dict()
    resumed = made(method, "none", **options)
    resumed.load_state_dict(state)
    assert_same_hand_outs(played(resumed, seed, range(2, 4)), straight)


def test_whole_tensors_and_all_kinds_of_modules_are_in_it(seed: int, tmp_path: Path) -> None:
    ranks = {"a": 3, "b": 5}
    options: dict[str, Any] = {"special": True, "saved": True}
    for optimiser in (None, FedAvgM()):
        servers = [Server("flexlora", fresh(ranks, **options), optimiser=optimiser) for _ in "12"]
        play(servers[0], trained(seed, ranks, **options))
        servers[0].save(tmp_path / "state")
        servers[1].load(tmp_path / "state")
        for server in servers:
            play(server, trained(seed + 1, ranks, "a", **options))
        assert_same_hand_outs(*servers)


def test_a_round_in_progress_is_not_in_it(seed: int) -> None:
    server = played(made("flexlora"), seed, range(1))
    server.start_round("ab")
    server.receive(trained(seed + 50, names="a")[0].update)
    other = made("flexlora")
    other.start_round("c")
    other.load_state_dict(server.state_dict())
    assert other.waiting_for == ()
    assert_same_hand_outs(other, played(made("flexlora"), seed, range(1)))
    assert_same_hand_outs(
        played(other, seed, range(1, 4)), played(made("flexlora"), seed, range(4))
    )


def test_a_state_does_not_change_with_the_server(seed: int) -> None:
    server = played(made("flexlora", "fedadam"), seed, range(1))
    state = server.state_dict()
    copies = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    played(server, seed, range(1, 4))
    assert all(torch.equal(state[name], copies[name]) for name in copies)  # type: ignore[arg-type]


def test_a_state_of_another_server_is_refused(seed: int) -> None:
    state = played(made("flexlora", "fedadam"), seed, range(1)).state_dict()
    larger = {**RANKS, "a": 5}
    others = {
        "method": made("zeropad", "fedadam"),
        "optimiser": Server("flexlora", fresh(), optimiser=FedAdam(0.5)),
        "clients": Server("flexlora", fresh(larger), optimiser=FedAdam()),
    }
    for field, other in others.items():
        with pytest.raises(InvalidInput, match=f"another {field}") as caught:
            other.load_state_dict(state)
        assert caught.value.field == "state"
        assert other.round == 1


def test_a_damaged_state_is_refused_and_changes_nothing(seed: int, tmp_path: Path) -> None:
    state = played(made("flexlora", "fedavgm"), seed, range(1)).state_dict()
    module = next(iter(MODULES))
    factor = next(name for name in state if name.startswith("adapter.0/"))

    def with_(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        tensor = state[name]
        assert isinstance(tensor, torch.Tensor)
        return {**state, name: change(tensor.clone())}

    without = {name: value for name, value in state.items() if name != factor}
    damaged: list[dict[str, Any]] = [
        {},
        {**state, "fastagg": "{"},
        {**state, "fastagg": "{}"},
        without,
        with_(factor, lambda t: t[:1]),
        with_(factor, lambda t: t * float("nan")),
        with_(f"total/{module}", lambda t: t[1:]),
        with_(f"total/{module}", lambda t: t * float("inf")),
        with_(f"moment.m/{module}", lambda t: t.double()),
        {**state, "total/nowhere": torch.zeros(2, 2)},
        {name: value for name, value in state.items() if not name.endswith(f"/{module}")},
    ]
    server = played(made("flexlora", "fedavgm"), seed, range(2))
    for each in damaged:
        with pytest.raises(InvalidInput, match="cannot be continued"):
            server.load_state_dict(each)
    for content in (None, b"", b"nonsense" * 100):
        file = tmp_path / "state"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidInput, match="cannot be continued"):
            server.load(file)
    assert_same_hand_outs(server, played(made("flexlora", "fedavgm"), seed, range(2)))


def test_saving_is_all_or_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, file = played(made("flexlora"), seed, range(1)), tmp_path / "run" / "server"
    server.save(file)
    before = file.read_bytes()
    played(server, seed, range(1, 2))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        server.save(file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["server"]
    server.save(file)
    resumed = made("flexlora")
    resumed.load(file)
    assert_same_hand_outs(resumed, server)


def test_kinds_do_not_depend_on_how_an_adapter_was_made(seed: int, tmp_path: Path) -> None:
    """Adapters registered from memory in one process and from folders in the next are the same."""
    in_memory = fresh({"a": 4, "b": 8})
    for name, adapter in in_memory.items():
        adapter.save(tmp_path / name)
    from fastagg import Adapter

    loaded = {name: Adapter.load(tmp_path / name) for name in in_memory}
    server = Server("flexlora", in_memory)
    play(server, [client("a", 4, modules=MODULES, seed=seed)])
    resumed = Server("flexlora", loaded)
    resumed.load_state_dict(server.state_dict())
    assert_same_hand_outs(server, resumed)
