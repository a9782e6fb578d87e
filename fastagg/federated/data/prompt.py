"""Examples as tokens: the prompt around them, and the loss on the answer alone."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastagg.errors import InvalidInput
from fastagg.federated.data.corpus import SEPARATOR
from fastagg.federated.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that counts in no loss, as in torch and transformers


@dataclass(frozen=True)
class PromptTemplate:
    """What stands before an answer.

    with_input, without_input: texts with ``{instruction}``, and ``{input}`` where there is one; other
        braces are doubled.

    Raises:
        InvalidInput: any other field in braces, or a text that leaves out what it is for.
    """

    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        _check_fields(self.with_input, "with_input", {"instruction", "input"})
        _check_fields(self.without_input, "without_input", {"instruction"})

    def prompt(self, example: Example) -> str:
        """The text before the answer; "" for a document, which has nothing to answer."""
        if not example.instruction and not example.input:
            return ""
        if not example.input:
            return self.without_input.format(instruction=example.instruction)
        return self.with_input.format(instruction=example.instruction, input=example.input)


def _check_fields(text: str, which: str, expected: set[str]) -> None:
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise InvalidInput(f"not a template: {error}", field=which, got=repr(text)) from None
    if found != expected:
        raise InvalidInput(
            "a template takes exactly its own fields",
            field=which,
            expected=" and ".join(f"{{{name}}}" for name in sorted(expected)),
            got=", ".join(f"{{{name}}}" for name in sorted(found)) or "none",
            cure="Write other braces twice",
        )


# Stanford Alpaca's, which FLoRA and FlexLoRA train with; a short one for models whose tokens are bytes.
TEMPLATES = {
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "plain": PromptTemplate("{instruction}\n{input}\n", "{instruction}\n"),
}


class Tokeniser(Protocol):
    """Text to token ids and back.

    start: put before a text, None where the model was trained without.
    end: put behind an answer.
    """

    @property
    def start(self) -> int | None: ...
    @property
    def end(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokeniser:
    """The 256 bytes of UTF-8. Byte 0, which no text needs, starts and ends one."""

    start = end = SEPARATOR

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace").replace(bytes([SEPARATOR]), b""))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).replace(bytes([SEPARATOR]), b"").decode("utf-8", "replace")


class PretrainedTokeniser:
    """A tokenizer of the ``transformers`` library.

    Raises:
        InvalidInput: it has no token that ends a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise InvalidInput(
                "the tokenizer has no token that ends a text, so answers would never end",
                field="eos_token",
                cure="Set the tokenizer's eos_token",
            )
        self._tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        # A tokenizer may know a first token and yet not put it there (GPT-2).
        first = tokenizer("a")["input_ids"][0]
        self.start = int(first) if first == tokenizer.bos_token_id else None

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example as the model sees it.

    input_ids: (tokens,) int64, prompt and answer.
    labels: (tokens,) int64, -100 on the prompt. A model shifts them itself.
    """

    input_ids: Tensor
    labels: Tensor


def encode(example: Example, template: PromptTemplate, tokeniser: Tokeniser, length: int) -> Encoded:
    """Prompt and answer as at most ``length`` tokens, of which at least one is learned from.

    Both are tokenised apart, so that the prompt has the same tokens as when an answer is generated.
    What is too long: the answer keeps what the prompt leaves it, and half of ``length`` in any case;
    it loses its end, and with it the token that says it ends. The prompt loses its middle, so that the
    beginning of the instruction and the call for an answer stay.

    Raises:
        InvalidInput: ``length`` below 2.
    """
    if length < 2:
        raise InvalidInput(
            "no room for a prompt and an answer", field="length", expected="at least 2", got=length
        )
    prompt = _prompt(example, template, tokeniser)
    answer = [*tokeniser.encode(example.output), tokeniser.end]
    answer = answer[: max(length - len(prompt), length // 2)]
    prompt = _without_middle(prompt, length - len(answer))
    return Encoded(
        torch.tensor(prompt + answer, dtype=torch.int64),
        torch.tensor([IGNORED] * len(prompt) + answer, dtype=torch.int64),
    )


def encode_prompt(
    example: Example, template: PromptTemplate, tokeniser: Tokeniser, length: int
) -> Tensor:
    """The prompt alone, to generate from: (tokens,) int64, at least 1 and at most ``length`` >= 1."""
    return torch.tensor(
        _without_middle(_prompt(example, template, tokeniser), length), dtype=torch.int64
    )


def _prompt(example: Example, template: PromptTemplate, tokeniser: Tokeniser) -> list[int]:
    text = tokeniser.encode(template.prompt(example))
    start = tokeniser.start
    if start is None and not text:
        # The first token of a document can only be learned behind another: the end of one before it.
        start = tokeniser.end
    return text if start is None else [start, *text]


def _without_middle(ids: list[int], length: int) -> list[int]:
    """At most ``length`` >= 1 of the ids: as many from the front as from the back, or one more."""
    back = length // 2
    return ids if len(ids) <= length else ids[: length - back] + ids[len(ids) - back :]
