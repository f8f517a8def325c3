"""From what the user names to checked examples."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gradrank.core.errors import DataError, GradrankError
from gradrank.lab.data import DataSpec, Split, hold_out, read_examples
from gradrank.lab.labels import index_labels


def lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(count: int = 10) -> list[dict]:
    return [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(count)]


def test_task_by_name():
    examples = read_examples(DataSpec("tiny-sentiment"))
    assert examples.head == "classification"
    assert examples.label_names == ("negative", "positive")
    assert len(examples.train.inputs) == 360
    assert len(examples.eval.inputs) == 40
    assert examples.metric == "accuracy"


def test_same_seed_same_split_other_seed_other_split():
    same = [read_examples(DataSpec("tiny-lm", seed=3)).eval.inputs for _ in range(2)]
    other = read_examples(DataSpec("tiny-lm", seed=4)).eval.inputs
    assert same[0] == same[1] != other


def test_file_with_guessed_columns(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"Sentence": r["text"], "Class": 1} for r in labelled()])
    with pytest.raises(DataError, match="single class"):
        read_examples(DataSpec(source, head="classification"))
    examples = read_examples(DataSpec(source, head="lm"))
    assert sorted([*examples.train.inputs, *examples.eval.inputs]) == [
        f"text {i}" for i in range(10)
    ]
    assert examples.train.labels is None


def test_evaluation_file_is_used_whole(tmp_path):
    source = lines(tmp_path / "a.jsonl", labelled())
    held = lines(tmp_path / "b.jsonl", [{"text": "new", "label": "b"}])
    examples = read_examples(DataSpec(source, head="classification", eval_file=held))
    assert len(examples.train.inputs) == 10
    assert (list(examples.eval.inputs), list(examples.eval.labels or ())) == (["new"], [1])


def test_lm_leaves_empty_lines_out(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\nthree\n")
    examples = read_examples(DataSpec(str(tmp_path / "a.txt"), head="lm", eval_fraction=0.4))
    assert (len(examples.train.inputs), len(examples.eval.inputs)) == (2, 1)


def test_picture_paths_are_relative_to_their_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    rows = [{"shot": "p.png", "label": i % 2} for i in range(4)]
    source = lines(tmp_path / "a.jsonl", rows)
    examples = read_examples(DataSpec(source, head="image", image_column="shot"))
    assert set(examples.train.inputs) == {tmp_path / "p.png"}


def test_picture_folder(tmp_path):
    for label in ("x", "y"):
        (tmp_path / label).mkdir()
        for number in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / label / f"{number}.png")
    examples = read_examples(DataSpec(str(tmp_path), head="image"))
    assert examples.label_names == ("x", "y")
    assert len(examples.train.inputs) + len(examples.eval.inputs) == 6
    with pytest.raises(DataError, match="only the 'image' head"):
        read_examples(DataSpec(str(tmp_path), head="lm"))


def test_prompts_of_ones_own(tmp_path):
    rows = [{"Prompt": f"ask {i}", "Response": f"say {i}"} for i in range(10)]
    examples = read_examples(DataSpec(lines(tmp_path / "a.jsonl", rows), head="instruct"))
    assert (examples.metric, examples.train.labels, examples.label_names) == ("eval_loss", None, ())
    both = [*examples.train.inputs, *examples.eval.inputs]
    assert {(p.prompt, p.completion) for p in both} == {(f"ask {i}", f"say {i}") for i in range(10)}
    named = DataSpec(
        lines(tmp_path / "b.jsonl", [{"x": "a", "y": "b"}] * 3),
        head="instruct",
        text_column="x",
        label_column="y",
    )
    assert read_examples(named).eval.inputs[0].completion == "b"
    with pytest.raises(DataError, match=r"looks like the prompt.*Name it with --text-column"):
        read_examples(DataSpec(named.source, head="instruct"))
    with pytest.raises(DataError, match=r"like the completion.*Name it with --label-column"):
        read_examples(DataSpec(named.source, head="instruct", text_column="x"))
    bad = lines(
        tmp_path / "c.jsonl", [{"prompt": "a", "output": "b"}, {"prompt": "a", "output": 5}]
    )
    with pytest.raises(DataError, match="row 2 has no text in column 'output'"):
        read_examples(DataSpec(bad, head="instruct"))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (DataSpec("tiny-ml"), "Did you mean 'tiny-lm'"),
        (DataSpec("tiny-ml", head="lm"), "Did you mean 'tiny-lm'"),
        (DataSpec("nowhere.jsonl", head="lm"), "'nowhere.jsonl' does not exist"),
        (DataSpec("./nowhere", head="lm"), "does not exist"),
        (DataSpec("tiny-lm", head="image"), "has the head 'lm'"),
        (DataSpec("tiny-lm", text_column="text"), "brings its own columns"),
        (DataSpec("tiny-lm", eval_file="x.txt"), "brings its own columns"),
        (DataSpec("tiny-lm", eval_fraction=1.0), "in \\(0, 1\\)"),
        (DataSpec("x.jsonl"), "needs a head"),
        (DataSpec("x.jsonl", head="ml"), "Known: classification, image, instruct, lm"),
    ],
)
def test_bad_request_is_explained(spec, told):
    with pytest.raises(GradrankError, match=told):
        read_examples(spec)


def test_public_data_set_without_network_is_explained():
    with pytest.raises(DataError, match=r"'some/data' could not be had.*Registered tasks: movie"):
        read_examples(DataSpec("some/data", head="lm"))


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([], {}, "is empty: it holds no rows"),
        ([{"text": ""}, {"text": None}], {"head": "lm"}, "none of its 2 rows has text"),
        ([{"text": 5}], {"head": "lm"}, r"holds int \('5'\), expected text"),
        ([{"text": "a"}], {"head": "lm"}, "at least 2 are needed"),
        (labelled(), {"text_column": "txet"}, "no column 'txet'. Did you mean 'text'"),
        (labelled(), {"label_column": "lable"}, "no column 'lable'. Did you mean 'label'"),
        ([{"a": 1, "b": 2}], {}, "looks like the text.*--text-column. Known: a, b"),
        ([{"text": "a"}] * 4, {}, "looks like the label"),
        ([*labelled(), {"text": "z", "label": None}], {}, "1 of 11 rows have no label.*row 11"),
        ([*labelled(), {"text": "z"}], {}, "1 of 11 rows have no label"),
        ([*labelled(), {"text": " ", "label": "a"}], {}, "1 of 11 rows have no input.*row 11"),
        ([{"text": "a", "label": i / 3} for i in range(9)], {}, "real numbers"),
        ([{"text": "a", "label": i} for i in range(9)], {}, "not a small fixed set: 9 different"),
        ([{"text": "a", "label": [i]} for i in range(9)], {}, "list values"),
    ],
)
def test_bad_rows_are_explained(tmp_path, rows, more, told):
    source = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=told):
        read_examples(DataSpec(source, **{"head": "classification", **more}))


def test_evaluation_label_that_training_lacks(tmp_path):
    source = lines(tmp_path / "a.jsonl", labelled())
    held = lines(tmp_path / "b.jsonl", [{"text": "new", "label": "c"}])
    with pytest.raises(DataError, match=r"labels that .* has not: c\. Known: a, b"):
        read_examples(DataSpec(source, head="classification", eval_file=held))


def test_numeric_classes_are_ordered_by_value():
    names, train, held = index_labels(["10", "9", 2, 9.0, True, False] * 3, ["2"], "x")
    assert names == ("2", "9", "10", "False", "True")
    assert train[:6] == [2, 1, 0, 1, 4, 3]
    assert held == [0]


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_hold_out_parts_the_examples(count, fraction, seed):
    split = Split(list(range(count)), [i % 3 for i in range(count)])
    kept, held = hold_out(split, fraction, seed, "x")
    assert sorted([*kept.inputs, *held.inputs]) == list(range(count))
    assert list(kept.inputs) == sorted(kept.inputs)
    assert len(held.inputs) == min(max(round(count * fraction), 1), count - 1)
    for part in (kept, held):
        assert part.labels == [i % 3 for i in part.inputs]
