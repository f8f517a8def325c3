import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.core.errors import DataError, OptionError
from gradrank.evidence.items import read_items
from gradrank.evidence.metrics import (
    METRICS,
    find_metric,
    metric_of_runs,
    metric_over,
    metric_value,
    metric_values,
)
from oracles import evidence as slow

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def classes(expected, predicted, **more):
    return {"kind": "classes", "expected": list(expected), "predicted": list(predicted), **more}


def test_binary_metrics_by_hand():
    # 3 true positives, 1 false negative, 2 false positives, 4 true negatives.
    expected = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    predicted = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    found = metric_values(classes(expected, predicted))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(6 / 9)
    assert found["accuracy_f1"] == pytest.approx((0.7 + 6 / 9) / 2)
    assert found["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert found["mcc"] == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))


def test_losses_by_hand():
    items = {"kind": "tokens", "nll": [2.0, 6.0], "count": [1, 3]}
    assert metric_values(items) == pytest.approx({"eval_loss": 2.0, "perplexity": math.exp(2.0)})
    # Of classes, every example counts once.
    assert metric_value("eval_loss", classes([0, 1], [0, 1], nll=[1.0, 2.0])) == 1.5
    assert metric_value("perplexity", {"kind": "tokens", "nll": [800.0], "count": [1]}) == math.inf


def test_answers_are_exact_and_groups_count_alike():
    items = {
        "kind": "answers",
        "expected": ["a", "a", "b", ""],
        "predicted": ["a", "A", "b", ""],
        "group": ["easy", "easy", "easy", "hard"],
    }
    # An answer that was not found is never right, even where nothing was expected.
    assert metric_value("accuracy", items) == pytest.approx((2 / 3 + 0) / 2)
    assert metric_value("accuracy", {**items, "group": None}) == pytest.approx(2 / 4)
    assert set(metric_values(items)) == {"accuracy"}


def test_values_where_a_metric_is_undefined():
    assert metric_value("mcc", classes([1, 1, 1], [1, 1, 1])) == 0.0
    assert metric_value("mcc", classes([0, 1, 0], [1, 1, 1])) == 0.0
    assert metric_value("f1", classes([0, 0], [0, 0])) == 0.0
    assert metric_value("f1", classes([0, 0], [1, 0])) == 0.0
    assert metric_value("f1", classes([1, 0], [0, 0])) == 0.0


@given(LABELS)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_classes_equal_the_slow_twin(pairs):
    expected, predicted = [e for e, _ in pairs], [p for _, p in pairs]
    items = classes(expected, predicted)
    assert metric_value("accuracy", items) == pytest.approx(slow.accuracy(expected, predicted))
    assert metric_value("macro_f1", items) == pytest.approx(slow.macro_f1(expected, predicted))
    assert metric_value("mcc", items) == pytest.approx(slow.mcc(expected, predicted), abs=1e-12)
    if max(expected + predicted) <= 1:
        assert metric_value("f1", items) == pytest.approx(slow.f1_of(1, expected, predicted))


def test_the_slow_twin_of_mcc_catches_a_binary_formula():
    expected, predicted = [0, 1, 2, 2, 1, 0], [0, 2, 2, 2, 1, 1]
    one_class = [int(e == 1) for e in expected], [int(p == 1) for p in predicted]
    assert slow.mcc(*one_class) != pytest.approx(slow.mcc(expected, predicted))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_resamples_equal_a_loop(name):
    rng = np.random.default_rng(0)
    n = 25
    if "tokens" in METRICS[name].kinds:
        items = {
            "kind": "tokens",
            "nll": rng.random(n).tolist(),
            "count": rng.integers(1, 5, n).tolist(),
        }
    else:
        items = classes(rng.integers(0, 2, n).tolist(), rng.integers(0, 2, n).tolist())
    index = rng.integers(0, n, (7, n))

    def chosen(row):
        taken = {
            key: [value[i] for i in row] if isinstance(value, list) else value
            for key, value in items.items()
        }
        return metric_value(name, taken)

    loop = [chosen(row) for row in index]
    assert metric_over(name, items, index) == pytest.approx(loop)
    assert metric_value(name, items, index[0]) == pytest.approx(loop[0])


def test_resamples_of_groups_leave_out_a_group_that_was_not_drawn():
    items = {
        "kind": "answers",
        "expected": ["a", "b"],
        "predicted": ["a", "x"],
        "group": ["1", "2"],
    }
    assert metric_over("accuracy", items, np.array([[0, 0], [0, 1]])) == pytest.approx([1.0, 0.5])


def test_many_runs_at_once_are_each_as_alone(monkeypatch):
    monkeypatch.setattr("gradrank.evidence.metrics._ENTRIES", 100)
    rng = np.random.default_rng(1)
    runs = [read_items(classes([0, 1, 2] * 7, rng.integers(0, 3, 21).tolist())) for _ in range(9)]
    index = rng.integers(0, 21, (11, 21))
    together = metric_of_runs("mcc", runs, index)
    for place, run in enumerate(runs):
        assert together[:, place] == pytest.approx(metric_over("mcc", run, index))
    with pytest.raises(DataError, match="one size"):
        metric_of_runs("mcc", [runs[0], read_items(classes([0], [0]))], index)


def test_metrics_refuse_what_they_are_not_defined_for():
    with pytest.raises(OptionError, match="Did you mean 'accuracy'"):
        find_metric("acuracy")
    with pytest.raises(DataError, match="class 2 occurs"):
        metric_value("f1", classes([0, 2], [0, 1]))
    with pytest.raises(DataError, match="kind 'tokens'"):
        metric_value("mcc", {"kind": "tokens", "nll": [1.0], "count": [1]})
    with pytest.raises(DataError, match="without nll"):
        metric_value("eval_loss", classes([0], [0]))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (None, "must be an object"),
        ({"kind": "token"}, "Did you mean 'tokens'"),
        ({"kind": ["tokens"]}, "unknown"),
        ({"kind": "tokens", "nll": [1.0]}, "lack 'count'"),
        ({"kind": "tokens", "nll": "1", "count": [1]}, "must be a list"),
        ({"kind": "tokens", "nll": [], "count": []}, "one length"),
        ({"kind": "tokens", "nll": [1.0], "count": [1, 2]}, "one length"),
        ({"kind": "tokens", "nll": ["x"], "count": [1]}, "'nll' of item 1 is 'x'"),
        ({"kind": "tokens", "nll": [1.0], "count": [0]}, "nothing was predicted"),
        ({"kind": "tokens", "nll": [1.0], "count": [-1]}, "whole number"),
        (classes([0, True], [0, 0]), "'expected' of item 2 is True"),
        (classes([0, 1], [0, -1]), "class index"),
        (classes([0, 1], [0, 10**9]), "class index"),
        ({"kind": "answers", "expected": ["a"], "predicted": [1]}, "must be a text"),
        (
            {
                "kind": "answers",
                "expected": ["a"] * 300,
                "predicted": ["a"] * 300,
                "group": [str(i) for i in range(300)],
            },
            "at most 256",
        ),
    ],
)
def test_malformed_items_are_named(items, message):
    with pytest.raises(DataError, match=message):
        read_items(items)


def test_fingerprints_tell_items_apart_and_not_predictions():
    one = read_items(classes([0, 1], [0, 0]))
    assert one.fingerprint == read_items(classes([0, 1], [1, 1])).fingerprint
    assert one.fingerprint != read_items(classes([1, 0], [0, 0])).fingerprint
    assert read_items(classes([0], [0], nll=[None])).diverged == 1
    assert read_items(classes([0], [0], nll=[10**400])).diverged == 1
