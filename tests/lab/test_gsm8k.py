"""GSM8K: final numbers, and files in the public schema."""

import gzip
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks import gsm8k
from gradrank.lab.benchmarks.gsm8k import load, normal_number, parse
from gradrank.lab.benchmarks.task import Where
from gradrank.lab.data import DataSpec, read_examples

ROWS = [
    {"question": "How many are 2 and 3?", "answer": "They are 2+3=<<2+3=5>>5.\n#### 5"},
    {"question": "How much is it?", "answer": "It is $<<1*1200=1200>>1,200.\n#### 1,200"},
    {"question": "How cold is it?", "answer": "It is -7.\n#### -7"},
]


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADRANK_DATA", raising=False)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 18.\n#### 18", "18"),
        ("#### 70,000", "70000"),
        ("#### $1,234,567.50", "1234567.5"),
        ("####-5", "-5"),
        ("#### -$5", "-5"),
        ("#### $ 12", "12"),
        ("#### 18.", "18"),
        ("#### 18.00", "18"),
        ("#### 0.50", "0.5"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### 100", "100"),
        ("#### -0", "0"),
        ("#### 1,00,000", "100000"),
        ("#### 18 eggs, not 20", "18"),
        ("#### 5\nQuestion: 6?\nAnswer: 7\n#### 8", "5"),  # the first that is marked
        ("She has 4 eggs. #### many", "4"),  # nothing after the mark
        ("#### 1.2.3 is 9", "9"),  # no number after the mark
        ("The answer is 42.", "42"),
        ("It costs $1,250.00 in all", "1250"),
        ("2 of 3, then 4", "4"),
        ("choose 1,2,3", "3"),  # a list, not thousands
        ("in 2010, 45 of them", "45"),
        ("10-4", "4"),
        ("(3)-4", "4"),
        ("10 - 4 is 6", "6"),
        ("it was -3", "-3"),
        ("a loss of $-3", "-3"),
        ("half: .5", "0.5"),
        ("50%", "50"),
        ("1234,567", "567"),
        ("no number", ""),
        ("", ""),
        ("####", ""),
        ("٣", ""),  # other digits are no answer
    ],
)
def test_final_number(text, number):
    assert parse(text) == number


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.decimals(-(10**9), 10**9, places=3), st.sampled_from(["{}", "${}", " {} ", "{}."]))
def test_normal_form_keeps_the_value_and_is_unique(value, form):
    for text in (str(value), f"{value:,}", f"{value:.5f}"):
        normal = normal_number(form.format(text))
        assert Decimal(normal) == value
        assert normal == normal_number(str(value))
        assert normal_number(normal) == normal


@given(st.text("0123456789.,$- ", max_size=12))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_anything_is_parsed_without_error(text):
    number = parse(f"#### {text}")
    assert number == "" or normal_number(number) == number


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_local_files_are_read(tmp_path, suffix):
    write(tmp_path / "gsm8k" / f"train.jsonl{suffix}", ROWS)
    write(tmp_path / "gsm8k" / f"test.jsonl{suffix}", ROWS[1:])
    loaded = load(Where(str(tmp_path)))
    train, labels = loaded.train
    assert labels is None
    assert [item.answer for item in train] == ["5", "1200", "-7"]
    assert train[0].prompt == "Question: How many are 2 and 3?\nAnswer:"
    assert train[0].completion == " They are 2+3=<<2+3=5>>5.\n#### 5"
    assert [item.answer for item in loaded.reported[0]] == ["1200", "-7"]
    assert all(parse(item.completion, item) == item.answer for item in train)


def test_public_copy_is_asked_for_both_splits(monkeypatch):
    asked = []

    def read(name, splits):
        asked.append((name, tuple(splits)))
        return [ROWS, ROWS[:1]]

    monkeypatch.setattr(gsm8k, "read_splits", read)
    said: list[str] = []
    loaded = load(Where(None, said.append))
    assert asked == [("openai/gsm8k:main", ("train", "test"))]
    assert (len(loaded.train[0]), len(loaded.reported[0])) == (3, 1)
    assert len(said) == 1


def test_splits_of_two_sources_are_not_mixed(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k" / "train.jsonl", ROWS[:1])
    monkeypatch.setattr(gsm8k, "read_splits", lambda *_: [ROWS, ROWS])
    assert len(load(Where(str(tmp_path))).train[0]) == 3


def test_data_that_is_nowhere_is_refused(tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("no network.")

    write(tmp_path / "gsm8k" / "train.jsonl", ROWS)
    monkeypatch.setattr(gsm8k, "read_splits", fail)
    with pytest.raises(DataError) as refused:
        load(Where(str(tmp_path)))
    told = str(refused.value)
    for part in (
        "task 'gsm8k'",
        f"'{tmp_path}'",
        "gsm8k/test.jsonl",
        "found train only",
        "no network",
        "GRADRANK_DATA",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a?", "answer": "5"}], "item 1 has no final number after '####'"),
        ([ROWS[0], {"question": "a?", "answer": "#### five"}], "item 2 has no final number"),
        ([{"question": "a?"}], "item 1 needs the texts 'question' and 'answer'"),
        ([{"question": " ", "answer": "#### 5"}], "item 1 needs the texts"),
        ([], "is empty"),
    ],
)
def test_malformed_items_are_named(tmp_path, rows, message):
    write(tmp_path / "gsm8k" / "train.jsonl", rows)
    write(tmp_path / "gsm8k" / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=message):
        load(Where(str(tmp_path)))


def test_task():
    (task,) = gsm8k.TASKS
    assert (task.name, task.head, task.metric) == ("gsm8k", "instruct", "accuracy")
    assert task.parse is parse
    assert task.max_new_tokens == 256


def test_without_choices_there_is_no_scoring_by_likelihood(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "gsm8k" / f"{split}.jsonl", ROWS)
    spec = DataSpec("gsm8k", data_dir=str(tmp_path))
    assert read_examples(spec).scoring == "generate"
    with pytest.raises(OptionError, match=r"'gsm8k' has no fixed choices.*Use scoring 'generate'"):
        read_examples(replace(spec, scoring="likelihood"))
