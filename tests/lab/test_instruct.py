"""Encoded prompts: what is learnt, what is cut, what is padded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.instruct import PromptCollator, cut_left, encode_prompts, prompt_tokens
from gradrank.lab.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def encoded(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def with_begin():
    """A tokenizer that puts ``<cls>`` before each text and ``<sep>`` after it."""
    tokenizer = byte_tokenizer(markers=True)
    tokenizer.bos_token = "<cls>"
    return tokenizer


def test_only_completion_and_end_token_are_learnt():
    data = encode_prompts([Prompt("ab", "xyz", "z")], TOKENIZER, 10)
    item = data[0]
    assert item["input_ids"] == [*encoded("abxyz"), END]
    assert item["labels"] == [-100, -100, *encoded("xyz"), END]
    assert (len(data), data.starts, data.cut) == (1, [2], 0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text("abc é", min_size=1, max_size=12), st.text("xyz", min_size=1, max_size=6))
def test_long_prompts_lose_their_beginning_and_nothing_else(prompt, completion):
    tail = [*encoded(completion), END]
    for room in range(1, 15):
        data = encode_prompts([Prompt(prompt, completion, "")], TOKENIZER, room + len(tail))
        head = encoded(prompt)
        assert data[0]["input_ids"] == [*head[-room:], *tail]
        assert data[0]["labels"] == [-100] * len(head[-room:]) + tail
        assert data.cut == (len(head) > room)


def test_cut_prompts_are_counted():
    prompts = [Prompt("a" * size, "x", "x") for size in (3, 4, 5, 9)]
    data = encode_prompts(prompts, TOKENIZER, 6)
    assert data.cut == 2
    assert [len(data[index]["input_ids"]) for index in range(4)] == [5, 6, 6, 6]


def test_completion_that_fills_the_sequence_is_refused():
    assert encode_prompts([Prompt("ab", "xyz", "")], TOKENIZER, 5)[0]["labels"][0] == -100
    with pytest.raises(DataError, match=r"prompt 2 has 3 tokens.* max_length of at least 5"):
        encode_prompts([Prompt("a", "x", ""), Prompt("ab", "xyz", "")], TOKENIZER, 4)


def test_empty_prompt_or_completion_is_refused():
    with pytest.raises(DataError, match="prompt 1 is empty"):
        encode_prompts([Prompt("", "x", "x")], TOKENIZER, 9)
    with pytest.raises(DataError, match="empty completion ''"):
        encode_prompts([Prompt("a", "", "x")], TOKENIZER, 9)


def test_tokenizer_without_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        encode_prompts([Prompt("a", "x", "x")], tokenizer, 9)


def test_begin_token_stays_and_no_token_stands_between_prompt_and_completion():
    tokenizer = with_begin()
    begin = tokenizer.bos_token_id
    whole = encode_prompts([Prompt("abcdef", "xy", "")], tokenizer, 20)
    assert whole[0]["input_ids"] == [begin, *encoded("abcdefxy"), END]
    cut = encode_prompts([Prompt("abcdef", "xy", "")], tokenizer, 6)
    assert cut[0]["input_ids"] == [begin, *encoded("efxy"), END]
    assert cut.cut == 1


def test_begin_token_goes_when_one_token_fits():
    tokenizer = with_begin()
    ids = prompt_tokens(["abc"], tokenizer)[0]
    assert cut_left(ids, 1, tokenizer) == encoded("c")
    assert cut_left(ids, 2, tokenizer) == [tokenizer.bos_token_id, *encoded("c")]
    assert cut_left(ids, None, tokenizer) == ids


def test_end_token_that_the_tokenizer_adds_is_not_part_of_a_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", END)]
    )
    assert prompt_tokens(["ab"], tokenizer) == [encoded("ab")]


def test_padding_is_on_the_right_neither_seen_nor_learnt():
    data = encode_prompts([Prompt("abc", "x", ""), Prompt("a", "y", "")], TOKENIZER, 9)
    batch = PromptCollator(pad=END)([data[0], data[1]])
    x, y = encoded("x"), encoded("y")
    assert batch["input_ids"].tolist() == [
        [*encoded("abc"), *x, END],
        [*encoded("a"), *y, END, END, END],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    # The end token is learnt once, although it is the padding token too.
    assert batch["labels"].tolist() == [
        [-100, -100, -100, *x, END],
        [-100, *y, END, -100, -100],
    ]


def test_order_is_kept_over_many_prompts():
    prompts = [Prompt(f"{number}?", f"{number}", "") for number in range(2100)]
    data = encode_prompts(prompts, TOKENIZER, 20)
    for number in (0, 999, 1000, 2099):
        assert data[number]["input_ids"] == [*encoded(f"{number}?{number}"), END]
        assert data.prompts[number] == prompts[number]
