"""Merging into checkpoints, against PEFT's merge_and_unload and the float64 equation."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter, make_config, make_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastagg.checkpoint import Change, merge_into_checkpoint
from fastagg.checkpoint.keys import KeyIndex, tied_embedding
from fastagg.errors import InvalidInput

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT warns of tied weights and of Conv1D, both wanted here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def trained(model: Any, base: Path, folder: Path, **lora: Any) -> None:
    """Saves the model at `base` and an adapter of it with random factors at `folder`."""
    shards = lora.pop("shards", None)
    model.save_pretrained(base, **({"max_shard_size": shards} if shards else {}))
    tuned = peft.get_peft_model(type(model).from_pretrained(base), peft.LoraConfig(**{"r": 4, **lora}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))
    tuned.save_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        return model.eval()(tokens).logits.double()


def compare(model: Any, base: Path, folder: Path, out: Path, atol: float) -> None:
    """The merged checkpoint's tensors and logits are those of PEFT's merge_and_unload."""
    kind = type(model)
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base), folder)
    expected = adapted.merge_and_unload()
    found, loading = kind.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert {p.dtype for p in found.parameters()} == {p.dtype for p in model.parameters()}
    state = found.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name].double(), tensor.double(), atol=atol, rtol=0, msg=name)
    scale = logits(expected).abs().max().item()
    assert (logits(found) - logits(expected)).abs().max().item() <= 20 * atol * max(scale, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [None, "8KB"])
def test_merge_equals_peft_on_one_file_and_on_shards(
    tmp_path: Path, dtype: torch.dtype, shards: str | None
) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = llama(dtype=dtype)
    trained(
        model,
        base,
        folder,
        shards=shards,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_alpha=12,
        rank_pattern={"down_proj": 6},
        alpha_pattern={"v_proj": 3},
    )
    report = merge_into_checkpoint(base, folder, out)
    assert len(report.merged) == 6
    assert len(report.shards) == (1 if shards is None else len(list(base.glob("*.safetensors"))))
    # One rounding of a weight below 1/8 in size, where PEFT rounds dW as well.
    compare(model, base, folder, out, {torch.float32: 1e-7}.get(dtype, 2.0**-9))


def test_merge_is_the_equation_rounded_once(tmp_path: Path) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = torch.randn(24, 16, dtype=torch.float64).to(dtype)
        base.mkdir(exist_ok=True)
        save_file({"lin.weight": weight, "other": torch.arange(3)}, base / "model.safetensors")
        make_folder(folder, {"lin": (24, 16)}, rank=5, alpha=7, seed=3, use_rslora=True)
        merge_into_checkpoint(base, folder, out, force=True)
        factors = load_file(folder / "adapter_model.safetensors")
        a = factors["base_model.model.lin.lora_A.weight"].double()
        b = factors["base_model.model.lin.lora_B.weight"].double()
        exact = weight.double() + 7 / math.sqrt(5) * b @ a
        found = load_file(out / "model.safetensors")
        # Half a unit in the last place, and the fp32 sum before it.
        unit = torch.finfo(dtype).eps / 2 + (0 if dtype == torch.float64 else 2e-6)
        assert ((found["lin.weight"].double() - exact).abs() <= unit * exact.abs() + 2e-6).all()
        assert found["lin.weight"].dtype == dtype
        assert torch.equal(found["other"], torch.arange(3))


def test_embedding_head_and_modules_to_save(tmp_path: Path) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = llama()
    trained(model, base, folder, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    report = merge_into_checkpoint(base, folder, out)
    assert report.replaced == ("lm_head.weight",)
    assert not report.added
    compare(model, base, folder, out, 1e-6)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_attn", "c_proj", "lm_head", "wte"]])
def test_conv1d_weights_lie_transposed(tmp_path: Path, targets: list[str]) -> None:
    """With lm_head among the targets PEFT's configuration says fan_in_fan_out=False, and the square
    c_proj of the attention shows no layout: its block's c_attn does."""
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = gpt2()
    trained(model, base, folder, target_modules=targets)
    merge_into_checkpoint(base, folder, out)
    compare(model, base, folder, out, 1e-6)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_base(tmp_path: Path, bias: str) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = gpt2()
    trained(model, base, folder, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)
    merge_into_checkpoint(base, folder, out)
    compare(model, base, folder, out, 1e-6)
    name = "transformer.h.0.attn.c_attn.bias"
    before = model.state_dict()[name]
    after = type(model).from_pretrained(out).state_dict()[name]
    assert not torch.equal(before, after)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_tied_weights_stay_tied_as_in_peft(tmp_path: Path, targets: list[str]) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = llama(tied=True)
    trained(model, base, folder, target_modules=targets)
    report = merge_into_checkpoint(base, folder, out)
    assert not report.untied
    assert bool(report.notes) == (len(targets) > 1)
    compare(model, base, folder, out, 1e-6)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_untied_weights_compute_what_the_adapter_did(tmp_path: Path, lora: dict[str, Any]) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = llama(tied=True)
    trained(model, base, folder, shards="8KB", **lora)
    report = merge_into_checkpoint(base, folder, out, tied="untie")
    assert report.untied
    assert report.added == ("lm_head.weight",)
    kind = type(model)
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base), folder)
    found, loading = kind.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert (logits(found) - logits(adapted)).abs().max().item() < 1e-5
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] == report.nbytes


def test_conv2d(tmp_path: Path) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    base.mkdir()
    folder.mkdir()
    weight = torch.randn(6, 3, 2, 2)
    save_file({"conv.weight": weight}, base / "model.safetensors")
    a, b = torch.randn(4, 3, 2, 2), torch.randn(6, 4, 1, 1)
    keys = ("base_model.model.conv.lora_A.weight", "base_model.model.conv.lora_B.weight")
    save_file(dict(zip(keys, (a, b), strict=True)), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(make_config({"conv": (6, 12)}, rank=4, alpha=8))
    )
    merge_into_checkpoint(base, folder, out)
    exact = weight.double() + 2.0 * torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    found = load_file(out / "model.safetensors")["conv.weight"].double()
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)


def test_other_files_are_copied_and_other_weights_left_out(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    simple_base(base)
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    (base / "config.json").write_text('{"model_type": "llama"}')
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", ".hidden"):
        (base / name).write_bytes(b"x" * 16)
    report = merge_into_checkpoint(base, make_adapter({"lin": (24, 16)}), out)
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["config.json", "model.safetensors", "tokenizer/vocab.json"]
    assert set(report.left_out) == {"pytorch_model.bin", "consolidated.safetensors", "model.gguf"}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_new_tensors_are_added(tmp_path: Path) -> None:
    """A classification head that a bare language model does not have."""
    base, out = tmp_path / "base", tmp_path / "out"
    simple_base(base)
    score = torch.randn(2, 16)
    adapter = make_adapter({"lin": (24, 16)}, extra_tensors={"base_model.model.score.weight": score})
    report = merge_into_checkpoint(base, adapter, out)
    assert report.added == ("score.weight",)
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], score)


def simple_base(folder: Path, **tensors: torch.Tensor) -> None:
    folder.mkdir()
    state = tensors or {"lin.weight": torch.zeros(24, 16)}
    save_file(
        {name.replace("__", "."): tensor for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"line.weight": torch.zeros(24, 16)}, ["'lin'", "lin.weight", "line.weight"]),
        ({"lin.weight": torch.zeros(24, 17)}, ["'lin'", "24 x 17", "24 x 16"]),
        ({"lin.weight": torch.zeros(24, 16, dtype=torch.int8)}, ["'lin'", "int8", "unquantised"]),
        (
            {"a.x.lin.weight": torch.zeros(24, 16), "b.x.lin.weight": torch.zeros(24, 16)},
            ["'lin'", "a.x.lin.weight", "b.x.lin.weight"],
        ),
        ({"lin.weight": torch.full((24, 16), 65504.0).half()}, ["'lin'", "float16", "infinite"]),
        ({"lin.weight": torch.full((24, 16), float("nan"))}, ["'lin'", "NaN", "base checkpoint"]),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: list[str]
) -> None:
    simple_base(tmp_path / "base", **tensors)
    adapter = make_adapter({"lin": (24, 16)}, alpha=8e5)
    with pytest.raises(InvalidInput) as caught:
        merge_into_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_checkpoints_that_are_damaged_are_refused(tmp_path: Path) -> None:
    adapter = make_adapter({"lin": (24, 16)})

    def refused(base: Path, *words: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            merge_into_checkpoint(base, adapter, tmp_path / "out")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "nowhere", "no folder")
    base = tmp_path / "base"
    base.mkdir()
    refused(base, "no safetensors files")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    refused(base, "no safetensors files", "save_pretrained")
    save_file({"lin.weight": torch.zeros(24, 16)}, base / "a.safetensors")
    save_file({"x": torch.zeros(1)}, base / "b.safetensors")
    refused(base, "a.safetensors, b.safetensors")
    index = base / "model.safetensors.index.json"

    def write(**weight_map: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write(**{"lin.weight": "b.safetensors", "x": "b.safetensors"})
    refused(base, "'lin.weight'", "b.safetensors")
    write(**{"lin.weight": "../a.safetensors"})
    refused(base, "'../a.safetensors'")
    write(**{"lin.weight": "a.safetensors", "x": "c.safetensors"})
    refused(base, "c.safetensors", "missing")
    index.write_text("{")
    refused(base, "cannot be read")
    write(**{"lin.weight": "a.safetensors", "x": "b.safetensors"})
    (base / "a.safetensors").write_bytes((base / "a.safetensors").read_bytes()[:-8])
    refused(base, "a.safetensors")


def test_what_is_read_is_never_overwritten(tmp_path: Path) -> None:
    base, folder = tmp_path / "models" / "base", make_folder(tmp_path / "ad", {"lin": (24, 16)})
    base.parent.mkdir()
    simple_base(base)
    before = (base / "model.safetensors").read_bytes()
    for out in (base, base / "merged", tmp_path / "models", folder, tmp_path):
        with pytest.raises(InvalidInput, match="overlaps"):
            merge_into_checkpoint(base, folder, out, force=True)
    assert (base / "model.safetensors").read_bytes() == before


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    simple_base(base)
    out.mkdir()
    (out / "old").write_text("old")
    adapter = make_adapter({"lin": (24, 16)})
    with pytest.raises(InvalidInput, match="--force"):
        merge_into_checkpoint(base, adapter, out)
    assert (out / "old").exists()
    merge_into_checkpoint(base, adapter, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_an_adapter_that_moved_base_weights_is_refused(tmp_path: Path) -> None:
    simple_base(tmp_path / "base")
    adapter = make_adapter({"lin": (24, 16)}, config_extra={"init_lora_weights": "pissa"})
    with pytest.raises(InvalidInput, match="init_lora_weights"):
        merge_into_checkpoint(tmp_path / "base", adapter, tmp_path / "out")


def test_a_change_need_not_be_an_adapter(tmp_path: Path) -> None:
    simple_base(tmp_path / "base")
    change = Change("nothing", [], whole={"lin.weight": torch.ones(24, 16)})
    merge_into_checkpoint(tmp_path / "base", change, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lin.weight"], torch.ones(24, 16))


def test_an_aggregate_is_merged_without_a_folder_between(tmp_path: Path) -> None:
    from fastagg.aggregation import Aggregate
    from fastagg.update import ClientUpdate
    from fastagg.whole_round import aggregate

    weight = torch.randn(24, 16)
    simple_base(tmp_path / "base", **{"lin.weight": weight})
    adapters = [make_adapter({"lin": (24, 16)}, rank=r, seed=r, name=str(r)) for r in (2, 3)]
    updates = [ClientUpdate(adapter, weight=adapter.rank("lin")) for adapter in adapters]
    exact = weight.double()
    for adapter, share in zip(adapters, (0.4, 0.6), strict=True):
        a, b = adapter.factors("lin")
        exact += share * adapter.scaling("lin") * b.double() @ a.double()
    for accumulator in ("stack", "dense"):
        result = aggregate(updates, "flexlora", accumulator=accumulator)
        assert isinstance(result, Aggregate)
        merge_into_checkpoint(tmp_path / "base", result.change(), tmp_path / "out", force=True)
        found = load_file(tmp_path / "out" / "model.safetensors")["lin.weight"]
        assert (found.double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("key", "keys", "found"),
    [
        ("model.layers.0.q.weight", ["model.layers.0.q.weight"], "model.layers.0.q.weight"),
        ("layers.0.q.weight", ["model.layers.0.q.weight"], "model.layers.0.q.weight"),
        ("model.layers.0.q.weight", ["layers.0.q.weight"], "layers.0.q.weight"),
        ("base.lm_head.weight", ["lm_head.weight"], "lm_head.weight"),
        (
            "language_model.model.layers.1.q.weight",
            ["model.language_model.layers.1.q.weight", "model.language_model.layers.0.q.weight"],
            "model.language_model.layers.1.q.weight",
        ),
        # Another layer, another tower's layer numbers, a namesake at the root: not the same module.
        ("model.layers.5.q.weight", ["model.layers.0.q.weight"], None),
        ("model.layers.0.q.weight", ["model.blocks.0.layers.0.q.weight"], None),
        ("model.layers.0.q_proj.weight", ["q_proj.weight"], None),
    ],
)
def test_names_match_up_to_a_prefix(key: str, keys: list[str], found: str | None) -> None:
    assert KeyIndex(keys).find(key, client=None, module="m") == found


def test_two_modules_never_mean_one_tensor(tmp_path: Path) -> None:
    simple_base(tmp_path / "base", **{"model.layers.0.q.weight": torch.zeros(24, 16)})
    adapter = make_adapter({"a.layers.0.q": (24, 16), "b.layers.0.q": (24, 16)})
    with pytest.raises(InvalidInput, match="same tensor as"):
        merge_into_checkpoint(tmp_path / "base", adapter, tmp_path / "out")


def test_an_absent_head_shares_the_embedding() -> None:
    keys = KeyIndex(["model.embed_tokens.weight", "model.layers.0.q.weight"])
    assert tied_embedding(keys, {}) == "model.embed_tokens.weight"
    assert tied_embedding(keys, {"tie_word_embeddings": False}) is None
    assert tied_embedding(keys, {"architectures": ["LlamaForSequenceClassification"]}) is None
    with_head = KeyIndex([*keys.keys, "lm_head.weight"])
    assert tied_embedding(with_head, {"tie_word_embeddings": True}) is None


def test_interrupted_merges_leave_nothing(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", make_folder(tmp_path / "adapter", {"lin": (24, 16)})
    simple_base(base)
    script = textwrap.dedent(
        """
        import sys, time
        from fastagg.checkpoint import merge_into_checkpoint
        def wait(done, total, what):
            print("writing", flush=True)
            time.sleep(60)
        merge_into_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], progress=wait)
        """
    )
    out = tmp_path / "some" / "out"
    arguments = [sys.executable, "-c", script, str(base), str(folder), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert process.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Eight shards of 16 MB: memory grows by one, and by what the allocator keeps of another."""
    base = tmp_path / "base"
    base.mkdir()
    weight_map = {}
    for i in range(8):
        name, key = f"model-{i:05d}.safetensors", f"layers.{i}.lin.weight"
        save_file({key: torch.zeros(2048, 2048)}, base / name)
        weight_map[key] = name
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    modules = {f"layers.{i}.lin": (2048, 2048) for i in range(8)}
    make_folder(tmp_path / "adapter", modules, rank=4)
    script = textwrap.dedent(
        """
        import sys, torch
        from fastagg import ops
        from fastagg.planning.budget import anonymous_bytes
        from fastagg.checkpoint import merge_into_checkpoint
        torch.ones(64, 64) @ torch.ones(64, 64)
        peak, before = 0, anonymous_bytes()
        def watch(done, total, what):
            global peak
            peak = max(peak, anonymous_bytes())
        merge_into_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], progress=watch)
        print(peak - before)
        """
    )
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, check=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout) < 3 * 16 * 2**20
