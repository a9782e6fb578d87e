"""Prompts, tokens and what is learned from them, with real tokenizers."""

from __future__ import annotations

import natural_instructions
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastagg.errors import InvalidInput
from fastagg.federated.clients.token_loss import IGNORED, require_labels
from fastagg.federated.data.examples import Example, read_clients
from fastagg.federated.data.prompt import (
    TEMPLATES,
    ByteTokeniser,
    PretrainedTokeniser,
    PromptTemplate,
    Tokeniser,
    encode,
    encode_prompt,
)

PLAIN = TEMPLATES["plain"]
BYTES = ByteTokeniser()
EXAMPLE = Example("add", "1 2", "3")


def pretrained(*, bos: bool, adds_bos: bool) -> PretrainedTokeniser:
    """A tokenizer of whole words, as transformers has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "add", "1", "2", "3", "a"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", words["<s>"])]
        )
    return PretrainedTokeniser(
        PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token="<s>" if bos else None,
            eos_token="</s>",
            unk_token="<unk>",
        )
    )


def test_template_has_two_forms() -> None:
    alpaca = TEMPLATES["alpaca"]
    assert alpaca.prompt(EXAMPLE).endswith("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n")
    assert "Input" not in alpaca.prompt(Example("add", "", "3"))
    assert PLAIN.prompt(Example("{input}", "{x}", "")) == "{input}\n{x}\n"
    assert PLAIN.prompt(Example("", "1 2", "3")) == "\n1 2\n"
    assert alpaca.prompt(Example("", "", "a document")) == ""


@pytest.mark.parametrize(
    ("with_input", "without_input", "said"),
    [
        ("{instruction}", "{instruction}", "with_input"),
        ("{instruction}{input}", "{instruction}{input}", "without_input"),
        ("{instruction}{input}{answer}", "{instruction}", "answer"),
        ("{instruction}{input}{", "{instruction}", "not a template"),
        ("{instruction}{input}{}", "{instruction}", "with_input"),
    ],
)
def test_templates_take_exactly_their_fields(with_input: str, without_input: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        PromptTemplate(with_input, without_input)
    assert PromptTemplate("{{{instruction}}}{input}", "{instruction}").prompt(EXAMPLE) == "{add}1 2"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_bytes_give_every_text_back(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode([*ids, BYTES.end]) == text


def test_bytes_take_any_text() -> None:
    assert BYTES.encode("a\0b\ud800") == [97, 98, 63]
    assert BYTES.decode([97, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("bos", "adds_bos", "start"), [(True, True, 0), (True, False, None), (False, False, None)]
)
def test_pretrained_tokenizers_start_as_they_do_themselves(
    bos: bool, adds_bos: bool, start: int | None
) -> None:
    tokeniser = pretrained(bos=bos, adds_bos=adds_bos)
    assert (tokeniser.start, tokeniser.end) == (start, 1)
    assert tokeniser.encode("add 1 2") == [3, 4, 5]
    assert tokeniser.decode([3, 4, 1]) == "add 1"
    begin = [] if start is None else [start]
    encoded = encode(EXAMPLE, PLAIN, tokeniser, 100)
    assert encoded.input_ids.tolist() == [*begin, 3, 4, 5, 6, 1]
    assert encoded.labels.tolist() == [IGNORED] * (len(begin) + 3) + [6, 1]
    document = encode(Example("", "", "3"), PLAIN, tokeniser, 100)
    # Where a text has no start of its own, it follows the end of another.
    assert document.input_ids.tolist() == [1 if start is None else start, 6, 1]
    assert document.labels.tolist() == [IGNORED, 6, 1]


def test_tokenizers_without_an_end_are_refused() -> None:
    tokenizer = pretrained(bos=True, adds_bos=False)._tokenizer
    tokenizer.eos_token = None
    with pytest.raises(InvalidInput, match="eos_token"):
        PretrainedTokeniser(tokenizer)


def test_loss_of_the_model_is_that_of_the_answer_given_the_prompt() -> None:
    from fastagg.federated.clients.llama import Shape, new_llama

    model = new_llama(Shape(16, 16, 1, 2), length=64, seed=0).eval()
    encoded = encode(EXAMPLE, PLAIN, BYTES, 64)
    loss = model(input_ids=encoded.input_ids[None], labels=encoded.labels[None]).loss
    logits = model(input_ids=encoded.input_ids[None]).logits[0].double().log_softmax(-1)
    prompt = b"\0add\n1 2\n"
    # The answer is "3" and the end: predicted at the prompt's last token and at "3".
    expected = -(logits[len(prompt) - 1, ord("3")] + logits[len(prompt), 0]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60), st.integers(2, 80))
def test_truncation_keeps_answer_and_prompt(
    instruction: int, input_: int, output: int, length: int
) -> None:
    example = Example("i" * instruction, "j" * input_, "".join(chr(65 + i) for i in range(output)))
    asked = encode_prompt(example, PLAIN, BYTES, 10_000).tolist()
    answer = [*example.output.encode(), 0]
    cut = encode(example, PLAIN, BYTES, length)
    learned = cut.labels[cut.labels != IGNORED].tolist()
    before = cut.input_ids[: len(cut.labels) - len(learned)].tolist()
    assert len(cut.input_ids) == min(length, len(asked) + len(answer))
    assert cut.input_ids.tolist() == before + learned
    # The answer keeps what the prompt leaves, and half at the least; the prompt loses its middle.
    assert learned == answer[: max(length - len(asked), length // 2)]
    front, back = (len(before) + 1) // 2, len(before) // 2
    assert before == asked[:front] + asked[len(asked) - back :]
    assert len(encode_prompt(example, PLAIN, BYTES, length)) == min(length, len(asked))
    require_labels([cut], "examples")


def test_prompts_to_generate_from_are_those_of_training() -> None:
    encoded = encode(EXAMPLE, TEMPLATES["alpaca"], BYTES, 1000)
    prompt = encode_prompt(EXAMPLE, TEMPLATES["alpaca"], BYTES, 1000)
    assert prompt.dtype == torch.int64
    assert encoded.input_ids[: len(prompt)].equal(prompt)
    assert int((encoded.labels == IGNORED).sum()) == len(prompt)


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no room"):
        encode(EXAMPLE, PLAIN, BYTES, 1)


def test_natural_instructions_are_learnable_at_any_length() -> None:
    tokeniser: Tokeniser = BYTES
    for client in read_clients(natural_instructions.folder(), seed=0):
        for length in (2, 192, 512):
            encoded = [encode(e, PLAIN, tokeniser, length) for e in client.held_out]
            require_labels(encoded, client.name)
            assert max(len(e.input_ids) for e in encoded) <= length
