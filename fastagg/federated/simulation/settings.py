"""The settings of a run, section by section.

Every setting has a default, so that any part of them is a configuration; its description is what a
user reads of it.
"""

from __future__ import annotations

import difflib
import sys
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastagg.byte_sizes import parse_bytes
from fastagg.errors import InvalidInput
from fastagg.federated.clients.ranks import FEED_FORWARD, FLEXLORA_TYPES, ClientRanks, Distribution
from fastagg.federated.data.prompt import TEMPLATES, PromptTemplate
from fastagg.methods import names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Beside the package's methods: averaging of full weights, and one model on the data of all.
FULL = "full"
CENTRALIZED = "centralized"
REFERENCES = (FULL, CENTRALIZED)


def did_you_mean(near: list[str]) -> str | None:
    """The cure for a name that is not known."""
    return f"Did you mean {near[0]!r}?" if near else None


def _of_setting(name: str, error: InvalidInput) -> InvalidInput:
    """The same error, about a setting."""
    return InvalidInput(
        error.problem, field=name, expected=error.expected, got=error.got, cure=error.cure
    )


def _items(value: object) -> object:
    """A list as an option has it: TOML's ``["a", "b"]``, or ``a,b``."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"not a list: {error}") from None
    return [item.strip() for item in value.split(",") if item.strip()]


Texts = Annotated[tuple[str, ...], BeforeValidator(_items)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Settings that belong together; frozen, and closed to names that it does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_as_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("a flag, where none is meant")
        return value


class EmbeddedModel(Section):
    """The byte-level Llama that is made and trained on the spot."""

    hidden: Count = Field(192, description="Width of the model.")
    feed_forward: Count = Field(512, description="Width of its feed-forward blocks.")
    layers: Count = Field(3, description="Number of layers.")
    heads: Count = Field(6, description="Attention heads; they divide the width.")
    steps: CountOrNone = Field(300, description="Steps of training before the first round.")
    batch: Count = Field(8, description="Windows of text in such a step.")
    learning_rate: Positive = Field(3e-3, description="Largest learning rate of that training.")


class ModelSection(Section):
    """What is fine-tuned."""

    name: str = Field("embedded", description="A Hugging Face id, a local folder, or 'embedded'.")
    revision: str = Field("", description="Commit or tag of a model on the hub; empty: the newest.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the base weights; adapters are float32."
    )
    device: str = Field("auto", description="Where clients train: 'cpu', 'cuda', 'cuda:1', or 'auto'.")
    embedded: EmbeddedModel = Field(EmbeddedModel(), description="The embedded model's sizes.")


class ColumnsSection(Section):
    """The fields of a record."""

    instruction: str = Field("instruction", description="Field of the instruction; empty: none.")
    input: str = Field("input", description="Field of the input; empty: none.")
    output: str = Field("output", min_length=1, description="Field of the answer.")
    label: str = Field("", description="Field that a partition goes by; empty: none.")


class TemplateSection(Section):
    """A prompt of one's own."""

    with_input: str = Field("", description="Text with {instruction} and {input}; empty: data.prompt's.")
    without_input: str = Field("", description="Text with {instruction} alone; empty: data.prompt's.")


class DataSection(Section):
    """What clients train on, and how it becomes tokens."""

    source: Literal["corpus", "folder", "jsonl", "dataset"] = Field(
        "corpus",
        description="The embedded corpus, a folder with JSONL files per client, one JSONL file, or a "
        "data set of the datasets library.",
    )
    path: str = Field("", description="Folder, file, or the data set's name; none for the corpus.")
    split: str = Field("train", description="Part of a data set, such as 'train[:10%]'.")
    subset: str = Field("", description="Configuration of a data set that has several.")
    revision: str = Field("", description="Commit or tag of a data set on the hub.")
    columns: ColumnsSection = Field(ColumnsSection(), description="The fields of a record.")
    partition: Literal["iid", "dirichlet", "label"] = Field(
        "iid", description="How one list of examples becomes clients; a folder has its clients already."
    )
    clients: Count = Field(
        10, description="Number of clients of the corpus, of an IID and of a Dirichlet partition."
    )
    alpha: Positive = Field(0.5, description="Dirichlet concentration; the smaller, the less alike.")
    held_out: Share = Field(
        0.1, description="Share of each client's examples held out, where no file of them is given."
    )
    held_out_file: Literal["test", "eval"] = Field(
        "test", description="Which file of a client is held out where its folder has both."
    )
    prompt: Literal["alpaca", "plain"] = Field("alpaca", description="What stands around an example.")
    template: TemplateSection = Field(TemplateSection(), description="A prompt of one's own.")
    length: Annotated[int, Field(ge=2)] = Field(512, description="Tokens of an example at most.")

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if self.source != "corpus" and not self.path:
            raise InvalidInput(
                f"source {self.source!r} needs one", field="data.path", expected="a path or a name"
            )
        by_label = self.source in ("jsonl", "dataset") and self.partition in ("dirichlet", "label")
        if by_label and not self.columns.label:
            raise InvalidInput(
                f"partition {self.partition!r} goes by a label",
                field="data.columns.label",
                expected="the field that holds it",
            )
        self.prompt_template()
        return self

    def prompt_template(self) -> PromptTemplate:
        """The named template, with the texts of one's own in place of its."""
        named = TEMPLATES[self.prompt]
        try:
            return PromptTemplate(
                self.template.with_input or named.with_input,
                self.template.without_input or named.without_input,
            )
        except InvalidInput as error:
            raise _of_setting(f"data.template.{error.field}", error) from None


class RankType(Section):
    """One kind of client."""

    rank: Count = Field(8, description="Rank of every module.")
    feed_forward: CountOrNone = Field(0, description="Rank in feed-forward blocks; 0: as elsewhere.")

    def ranks(self) -> ClientRanks:
        return ClientRanks(self.rank, {FEED_FORWARD: self.feed_forward} if self.feed_forward else {})


class RanksSection(Section):
    """Who gets which rank."""

    scheme: Literal["each", "flora", "memory", Distribution] = Field(
        "flora",
        description="A list of one's own, FLoRA's list, by memory, or one of FlexLoRA's distributions.",
    )
    each: Annotated[tuple[Count, ...], BeforeValidator(_items)] = Field(
        (16,), description="Scheme 'each': a rank for each client in their order, or one for all."
    )
    memory: Texts = Field(
        ("64MiB",),
        description="Scheme 'memory': what weights, gradient and AdamW's moments of an adapter may "
        "take, for each client in their order, or one for all.",
    )
    types: Annotated[
        tuple[RankType, ...], BeforeValidator(_items), Field(min_length=4, max_length=4)
    ] = Field(
        tuple(
            RankType(rank=each.rank, feed_forward=each.pattern.get(FEED_FORWARD, 0))
            for each in FLEXLORA_TYPES
        ),
        description="The four types that FlexLoRA's distributions are over, the smallest first.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RanksSection:
        if not self.each or not self.memory:
            empty = "memory" if self.each else "each"
            raise InvalidInput("an empty list", field=f"ranks.{empty}", expected="at least one")
        self.budgets()
        return self

    def budgets(self) -> tuple[int, ...]:
        """``memory`` in bytes."""
        try:
            return tuple(parse_bytes(amount) or 0 for amount in self.memory)
        except InvalidInput as error:
            raise _of_setting("ranks.memory", error) from None


class LoraSection(Section):
    """The clients' adapters, beside their ranks."""

    targets: Texts = Field(
        ("all-linear",), min_length=1, description="Ends of the modules' names, or 'all-linear' alone."
    )
    alpha_over_rank: Positive = Field(2.0, description="lora_alpha over the rank, in every module.")
    dropout: Share = Field(0.0, description="Of the adapters' input, while training.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")

    @property
    def target_modules(self) -> str | list[str]:
        """As ``peft.LoraConfig`` takes it."""
        return self.targets[0] if self.targets == ("all-linear",) else list(self.targets)


class TrainingSection(Section):
    """What a client does in a round."""

    epochs: CountOrNone = Field(1, description="Passes over the client's examples; 0: count steps.")
    steps: CountOrNone = Field(0, description="Steps instead of epochs; 0: count epochs.")
    batch: Count = Field(8, description="Examples in a step.")
    learning_rate: Positive = Field(3e-4, description="Largest learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate goes down to 0 within a round, if it does."
    )
    warm_up: Share = Field(0.1, description="Share of the steps in which the learning rate rises.")
    weight_decay: NotNegative = Field(0.0, description="Of AdamW.")
    clip: NotNegative = Field(1.0, description="Largest norm of the gradient; 0: as it comes.")
    patience: CountOrNone = Field(
        0, description="Early stopping: looks in a row without a lower held-out loss; 0: never stops."
    )
    evaluate_every: CountOrNone = Field(0, description="Steps between looks; 0: one an epoch.")

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if (self.epochs == 0) == (self.steps == 0):
            raise InvalidInput(
                "a client trains for epochs or for steps",
                field="training.steps",
                expected="one of training.epochs and training.steps above 0",
                got=f"{self.epochs} epochs and {self.steps} steps",
                cure="Set the other to 0",
            )
        return self


class FederationSection(Section):
    """Rounds, who takes part, and what the server makes of it."""

    methods: Texts = Field(
        ("flexlora",), min_length=1, description="Methods, all run on the same clients and batches."
    )
    rounds: Count = Field(5, description="Rounds in all.")
    participation: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the clients drawn for a round."
    )
    clients_per_round: CountOrNone = Field(0, description="Their number instead; 0: by the share.")
    min_clients: Count = Field(1, description="Updates without which a round does not count.")
    on_too_few: Literal["repeat", "end"] = Field(
        "end", description="What then: repeat the round, or end the run with an error."
    )
    timeout: NotNegative = Field(0.0, description="Seconds that a client may train; 0: any.")
    optimiser: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = Field(
        "fedavg", description="The server's, on the clients' sum as the pseudo-gradient."
    )
    server_learning_rate: Positive = Field(1.0, description="Of the server's optimiser.")
    beta1: Share = Field(0.9, description="Momentum of fedavgm, fedadam and fedyogi.")
    beta2: Share = Field(0.99, description="Decay of the second moment, of fedadam and fedyogi.")
    tau: Positive = Field(1e-3, description="Added to the root of the second moment.")
    workers: Count = Field(1, description="Processes that train clients.")

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        known = (*names(), *REFERENCES)
        for method in methods:
            if method not in known:
                raise InvalidInput(
                    "no such method",
                    field="federation.methods",
                    expected=f"some of {', '.join(known)}",
                    got=repr(method),
                    cure=did_you_mean(difflib.get_close_matches(method, known, 1)),
                )
        if len(set(methods)) < len(methods):
            raise InvalidInput("a method twice", field="federation.methods", got=", ".join(methods))
        return methods


class EvaluationSection(Section):
    """What is measured on the held-out examples."""

    every: Count = Field(1, description="Rounds from one evaluation to the next; the last has one.")
    batch: Count = Field(16, description="Examples at a time.")
    max_examples: CountOrNone = Field(0, description="Examples of a client at most; 0: all.")
    answers: Annotated[tuple[Literal["rouge-l", "exact-match"], ...], BeforeValidator(_items)] = Field(
        (), description="What generated answers are scored by; generating is slow."
    )
    new_tokens: Count = Field(64, description="Tokens of a generated answer at most.")
    distance: bool = Field(True, description="Measure how far what clients receive is from dW.")
    similarity: CountOrNone = Field(
        64, description="Clients of a round at most whose updates are compared with each other; 0: none."
    )


class OutputSection(Section):
    """What a run leaves."""

    folder: str = Field("run", min_length=1, description="The run's folder.")
    keep: Literal["last", "all"] = Field("last", description="Adapters of which rounds are kept.")
    plots: bool = Field(True, description="Draw PNGs and write report.html.")
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_items)] = Field(
        (), description="Where else each round is logged, beside metrics.jsonl."
    )
    project: str = Field("fastagg", min_length=1, description="Project at Weights & Biases.")
