"""The one model that a process keeps in memory, and the adapters that come and go in it.

A client's adapter is put in place by PEFT, trained, captured and taken out again; the base weights
are the same bits afterwards. Only a merge changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastagg.adapter import Adapter
from fastagg.errors import FastAggError, InvalidInput
from fastagg.federated.clients.llama import Shape, Training, new_llama, train
from fastagg.federated.clients.placement import ADAPTER, placed, require_same_tensors
from fastagg.federated.data.corpus import language_reference
from fastagg.federated.seeds import seed_of, seeded
from fastagg.peft_format.config import AdapterConfig
from fastagg.update import ClientUpdate
from fastagg.whole_round import aggregate

if TYPE_CHECKING:
    from peft import PeftModel


class LocalModel:
    """A base model whose weights ask for no gradient, and at most one adapter in it.

    Args:
        network: a causal language model as transformers has it; taken over, not copied. Tied weights
            and Conv1D modules (GPT-2) are understood.
        device: where it is moved to.
        round: the round whose starting weights it holds, see :meth:`merge_for`.

    Attributes:
        network: the model itself, in evaluation mode whenever nobody trains it.
    """

    def __init__(
        self, network: nn.Module, *, device: str | torch.device = "cpu", round: int = 1
    ) -> None:
        self.network = network.to(device).requires_grad_(False).eval()
        self.round = round
        self._in_place: PeftModel | None = None
        self._given: Adapter | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> LocalModel:
        """A model of the Hugging Face hub, or of a local folder that transformers wrote.

        Raises:
            InvalidInput: there is no such model, or it is no causal language model.
        """
        from transformers import AutoModelForCausalLM

        # Weights that a checkpoint lacks are drawn; so are those about to be overwritten.
        with seeded(0, torch.device("cpu")):
            try:
                network = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, revision=revision)
            except (OSError, ValueError) as error:
                raise InvalidInput(
                    f"no causal language model can be loaded: {str(error).splitlines()[0]}",
                    field="model",
                    expected="a model of the Hugging Face hub, or a folder written by save_pretrained",
                    got=str(name),
                ) from error
        return cls(network, device=device)

    @classmethod
    def embedded(
        cls,
        shape: Shape,
        pre_training: Training | None = None,
        *,
        length: int,
        seed: int,
        device: str | torch.device = "cpu",
        on_step: Callable[[], None] | None = None,
    ) -> LocalModel:
        """The byte-level Llama of the demo (float32), which needs no file and no network.

        Args:
            pre_training: how it is trained on the language reference of Python first; None leaves it
                as it was drawn.
            length: bytes of context.
        """
        network: nn.Module = new_llama(shape, length=length, seed=seed_of(seed, "base weights"))
        network.to(device)
        if pre_training is not None:
            text = language_reference().to(device)
            begin = seed_of(seed, "pre-training")
            train(network, text, pre_training, length=length, seed=begin, on_step=on_step)
        return cls(network, device=device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weights. PEFT keeps adapters of half-precision models in float32."""
        return next(self.network.parameters()).dtype

    @contextmanager
    def adapter(self, start: Adapter | AdapterConfig | Any, *, seed: int = 0) -> Iterator[PeftModel]:
        """The model with an adapter in place, for as long as the block lasts.

        Only the adapter's own tensors ask for gradients. Whatever happens in the block, the base is
        left as it came: weights bit for bit, modules, and what asks for gradients.

        Args:
            start: an Adapter to go on from; or a configuration (``peft.LoraConfig``, AdapterConfig or
                the fields of an ``adapter_config.json``), for fresh factors: B = 0 and A drawn.
            seed: of fresh factors. Under one seed, adapters of different ranks share their first rows.

        Raises:
            InvalidInput: an adapter or a configuration that does not fit this model.
        """
        self._require_bare()
        try:
            with placed(self.network, start, seed) as self._in_place:
                self._given = start if isinstance(start, Adapter) else None
                yield self._in_place
        finally:
            self._in_place = self._given = None

    def capture(self, name: str | None = None) -> Adapter:
        """A copy of the adapter in place, on the CPU: what PEFT's ``save_pretrained`` would write.

        One that goes on from an Adapter keeps that one's configuration, whatever the fields were that
        PEFT filled in.

        Raises:
            InvalidInput: no adapter is in place.
        """
        from peft import get_peft_model_state_dict

        if self._in_place is None:
            raise InvalidInput(
                "there is no adapter to capture", cure="Capture it inside `with model.adapter(...)`"
            )
        # "auto" would ask the model hub whether the vocabulary grew.
        state = get_peft_model_state_dict(self._in_place, save_embedding_layers=False)
        if self._given is not None:
            return Adapter(state, self._given.config, name=name)
        config = {**self._in_place.peft_config[ADAPTER].to_dict(), "inference_mode": True}
        return Adapter(state, config, name=name)

    def merge(self, adapter: Adapter) -> None:
        """W += scaling B A for each module of the adapter, in place, rounded once to the base's dtype;
        tensors of ``modules_to_save`` are replaced. All is checked before any weight is changed.

        Raises:
            InvalidInput: the adapter does not fit this model, is not finite, or changes a weight that
                two modules share, where the sum would change the other module too.
        """
        self._require_bare()
        self._refuse_shared(adapter)
        # The stack of one client with all the weight is its adapter: dW = 1 s B A.
        where = "auto" if self.device.type == "cuda" else "cpu"
        update = ClientUpdate(adapter, client_id=adapter.name or "the adapter")
        aggregate([update], "flora", device=where).merge_into(self.network)

    def merge_for(self, round: int, adapter: Adapter) -> None:
        """Merges what a round begins with, once, whichever of the clients that share the model asks.

        Raises:
            InvalidInput: a round whose predecessors were not all merged, and as :meth:`merge`.
        """
        if round == self.round:
            return
        if round != self.round + 1:
            raise InvalidInput(
                "the base model lacks the merges of earlier rounds, or is ahead",
                client=adapter.name,
                field="round",
                expected=f"{self.round} or {self.round + 1}, the base being that of round {self.round}",
                got=round,
                cure="Hand every round's adapter to every model, or set its weights to that round's",
            )
        self.merge(adapter)
        self.round = round

    def weights(self) -> dict[str, Tensor]:
        """Copies of the base weights on the CPU; tied weights once, under their first name."""
        self._require_bare()
        return {
            name: weight.detach().to("cpu", copy=True)
            for name, weight in self.network.named_parameters()
        }

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrites the base weights.

        Raises:
            InvalidInput: names or shapes other than those of :meth:`weights`; nothing was changed.
        """
        self._require_bare()
        own = dict(self.network.named_parameters())
        require_same_tensors(own, weights, field="weights")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])

    def restart(self, load: Callable[[], nn.Module]) -> None:
        """Loads a network that holds the weights of round 1, when this one's memory is free."""
        self._require_bare()
        device = self.device
        self.network = nn.Identity()
        self.network = load().to(device).requires_grad_(False).eval()
        self.round = 1

    @contextmanager
    def all_weights(self) -> Iterator[nn.Module]:
        """The bare model with gradients on every weight, for full fine-tuning. The weights from before
        the block come back after it: take those trained by :meth:`weights` inside."""
        before = self.weights()
        try:
            yield self.network.requires_grad_(True)
        finally:
            self.network.requires_grad_(False).eval()
            self.set_weights(before)

    def _require_bare(self) -> None:
        if self._in_place is not None:
            raise FastAggError("an adapter is in place in this model: leave its `with` block first")

    def _refuse_shared(self, adapter: Adapter) -> None:
        names: dict[int, list[str]] = {}
        for name, weight in self.network.named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), []).append(name)
        changed = {f"{module}.weight" for module in adapter.modules}
        changed |= {span.parameter for span in adapter.layout.whole}
        for shared in names.values():
            if len(shared) > 1 and changed & set(shared):
                raise InvalidInput(
                    "a merge would change another module too, which shares this weight",
                    client=adapter.name,
                    module=next(name for name in shared if name in changed),
                    field="target_modules",
                    expected="weights of one module each",
                    got=" = ".join(shared),
                    cure="Leave the tied module out of target_modules and modules_to_save, or untie the "
                    "model's embeddings first",
                )
