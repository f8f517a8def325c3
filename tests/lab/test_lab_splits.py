"""Which examples are trained on and evaluated: disjoint, repeatable, nested."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradrank.core.errors import DataError, GradrankError, OptionError
from gradrank.lab.data import DataSpec, Split, read_examples
from gradrank.lab.splits import Choice, choose


def split(name: str, count: int) -> Split:
    return Split([(name, i) for i in range(count)], [i % 2 for i in range(count)])


@given(
    st.integers(2, 60),
    st.integers(1, 40),
    st.data(),
    st.integers(0, 9),
    st.none() | st.integers(1, 70),
)
def test_train_validation_and_test_never_overlap(count, reported, data, seed, few):
    validation = data.draw(st.integers(1, count - 1))
    train, test = split("train", count), split("test", reported)
    made = [
        choose(train, test, Choice(which, validation, few, few, seed), "x")
        for which in ("test", "validation", "validation")
    ]
    (trained, tested), (same, held), again = made
    assert (same, held) == again
    assert trained == same
    assert {name for name, _ in tested.inputs} == {"test"}
    assert {name for name, _ in (*trained.inputs, *held.inputs)} == {"train"}
    assert not set(trained.inputs) & set(held.inputs)
    assert len(trained.inputs) == min(count - validation, few or count)
    assert len(held.inputs) == min(validation, few or count)
    assert len(tested.inputs) == min(reported, few or reported)
    for part in (trained, held, tested):
        assert list(part.inputs) == sorted(part.inputs)
        assert part.labels == [number % 2 for _, number in part.inputs]


@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 20))
def test_smaller_parts_are_contained_in_larger_ones(seed, one, two):
    small, large = sorted((one, two))
    parts = [
        choose(split("a", 40), split("b", 30), Choice("test", 5, size, size, seed), "x")
        for size in (small, large)
    ]
    for few, more in zip(*parts, strict=True):
        assert set(few.inputs) <= set(more.inputs)


def test_choices_do_not_move_one_another():
    train, test = split("a", 50), split("b", 50)
    plain = choose(train, test, Choice("validation", 10, seed=3), "x")[1]
    assert choose(train, test, Choice("validation", 10, train_examples=7, seed=3), "x")[1] == plain
    fewer = choose(train, test, Choice("test", 10, eval_examples=9, seed=3), "x")[1]
    assert choose(train, test, Choice("test", 20, None, 9, 3), "x")[1] == fewer
    assert choose(train, test, Choice("validation", 10, seed=4), "x")[1] != plain


def test_nothing_asked_for_changes_nothing():
    train, test = split("a", 5), split("b", 4)
    assert choose(train, test, Choice(), "x") == (train, test)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"split": "valid"}, "unknown split 'valid'. Did you mean 'validation'"),
        ({"split": "validation"}, "validation is 0. Say how many"),
        ({"validation": -1}, "0 or more"),
        ({"train_examples": 0}, "train_examples is 0; at least 1"),
        ({"eval_examples": 0}, "eval_examples is 0; at least 1"),
        ({"scoring": "guess"}, "unknown scoring 'guess'"),
    ],
)
def test_bad_choice_is_explained(more, told):
    with pytest.raises(OptionError, match=told):
        read_examples(DataSpec("tiny-lm", **more))


def test_validation_needs_something_left_to_train_on():
    with pytest.raises(DataError, match=r"has 5 training examples.*at most 4"):
        choose(split("a", 5), split("b", 4), Choice(validation=5), "x")


@pytest.mark.parametrize("task", ["tiny-lm", "tiny-sentiment"])
def test_tasks_without_a_split_of_their_own(task):
    plain = read_examples(DataSpec(task, seed=2))
    test = read_examples(DataSpec(task, seed=2, validation=30, train_examples=50))
    held = read_examples(
        DataSpec(task, seed=2, validation=30, train_examples=50, split="validation")
    )
    assert test.eval == plain.eval
    assert test.train == held.train
    assert (len(test.train.inputs), len(held.eval.inputs)) == (50, 30)
    assert test.label_names == held.label_names == plain.label_names
    assert (test.describe["split"], held.describe["split"]) == ("test", "validation")
    assert "task" not in test.describe


def test_evaluation_file_stays_the_reported_split(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(20)))
    (tmp_path / "b.txt").write_text("reported\n")
    spec = {"head": "lm", "eval_file": str(tmp_path / "b.txt"), "validation": 5}
    source = str(tmp_path / "a.txt")
    assert read_examples(DataSpec(source, **spec)).eval.inputs == ["reported"]
    held = read_examples(DataSpec(source, split="validation", **spec))
    assert len(held.eval.inputs) == 5
    assert len(held.train.inputs) == 15
    with pytest.raises(GradrankError, match="has 20 training examples"):
        read_examples(DataSpec(source, **{**spec, "validation": 20}))
