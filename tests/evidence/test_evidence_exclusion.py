import dataclasses

import numpy as np
import pytest

from evidence.evidence_cases import record
from gradrank.evidence.comparison import compare
from gradrank.evidence.stability import rank_agreement, share_in_common
from gradrank.record.run import RunRecord

QUICK = 50


def good(methods=("uniform", "gard"), seeds=3):
    rng = np.random.default_rng(0)
    return [record(m, s, rng.random(20) < 0.7) for m in methods for s in range(seeds)]


def changed(one, /, **changes):
    return dataclasses.replace(one, comparison={**one.comparison, **changes})


def excluded_by(bad):
    """Compare good records with a bad one; the good ones must not notice."""
    alone, found = compare(good(), resamples=QUICK), compare([*good(), bad], resamples=QUICK)
    assert [c.mean for c in found.cells if c.outcomes] == [c.mean for c in alone.cells]
    assert len(found.excluded) == 1
    return found.excluded[0]


def stranger(**changes):
    rng = np.random.default_rng(1)
    return changed(record("random", 0, rng.random(20) < 0.5), run="bad", **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "other"}, "of the recipe 'other', not of 'sim'"),
        ({"phase": "rehearsal"}, "'rehearsal', none of tune, final, stability"),
        ({"seed": None}, "its seed is None"),
        ({"seed": True}, "its seed is True"),
        ({"lr": "fast"}, "its learning rate is 'fast'"),
        ({"task": ""}, "'task' is ''"),
        ({"metric": "bleu"}, "'bleu' is unknown"),
        ({"metric": None}, "None is unknown"),
        ({"metric": "mcc"}, "counts mcc; the other runs of toy: accuracy"),
        ({"higher_is_better": False}, "wrong direction"),
        ({"matched": "yes"}, "'matched' or 'notes'"),
        ({"notes": "none"}, "'matched' or 'notes'"),
        ({"phase": "tune", "lr": None}, "which learning rate"),
    ],
)
def test_records_that_do_not_fit_are_left_out_by_name_and_reason(changes, reason):
    found = excluded_by(stranger(**changes))
    assert found.name == "bad"
    assert reason in found.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": "interrupted"}, "interrupted"),
        ({"items": None}, "no items"),
        ({"items": {"kind": "classes"}}, "lack 'expected'"),
        ({"metrics": {"accuracy": 0.99}}, "its accuracy is 0.99, but its items give"),
        ({"trainable_parameters": {"peak": 5}}, "how many parameters"),
    ],
)
def test_records_that_are_incomplete_or_contradict_themselves(fields, reason):
    found = excluded_by(dataclasses.replace(stranger(), **fields))
    assert reason in found.reason


def test_a_run_of_its_own_is_no_part_of_a_comparison():
    found = excluded_by(RunRecord(name="mine", kind="train"))
    assert (found.name, found.reason) == ("mine", "it holds no 'comparison': a run of its own")


def test_runs_on_other_items_are_left_out():
    short = stranger()
    items = {k: v if k == "kind" else v[:15] for k, v in short.items.items()}
    found = excluded_by(dataclasses.replace(short, items=items, metrics={}))
    assert found.reason == "evaluated on 15 items, the other runs of toy on 20"
    other = {**short.items, "expected": [0] * 20, "predicted": [0] * 20}
    found = excluded_by(dataclasses.replace(short, items=other, metrics={}))
    assert found.reason == "evaluated on other items than the other runs of toy"


def test_two_records_of_one_run_count_for_nothing_and_a_copy_counts_once():
    records = good()
    rival = record("gard", 0, np.zeros(20))
    found = compare([*records, changed(rival, run="rival")], resamples=QUICK)
    assert len(found.excluded) == 2
    assert all("one of 2 different records" in entry.reason for entry in found.excluded)
    (cell,) = [c for c in found.cells if c.method == "gard"]
    assert [o.seed for o in cell.outcomes] == [1, 2]
    assert cell.missing == (0,)
    copied = compare([*records, records[0]], resamples=QUICK)
    assert [entry.reason for entry in copied.excluded] == ["a copy of another record"]
    assert copied.cells == compare(records, resamples=QUICK).cells


JUNK = [None, -1, "x", True, 0.5, [], {}, [[1, "x"]], {"targets": 3, "budget": 3}]


@pytest.mark.parametrize("junk", JUNK)
def test_no_field_of_a_record_can_break_a_comparison(junk):
    one = stranger()
    for key in one.comparison:
        found = compare([*good(), changed(one, **{key: junk})], resamples=QUICK)
        assert len([c for c in found.cells if c.method in {"uniform", "gard"}]) >= 2
    for key in ("expected", "predicted", "nll", "kind"):
        compare([*good(), dataclasses.replace(one, items={**one.items, key: junk})], resamples=2)
    for name in ("peak", "train_seconds", "accuracy"):
        fields = ("trainable_parameters", "cost", "metrics")
        spoilt = {field: {**getattr(one, field), name: junk} for field in fields}
        compare([*good(), dataclasses.replace(one, **spoilt)], resamples=2)
    if isinstance(junk, dict | None):
        compare([*good(), dataclasses.replace(one, plan=junk, ranks_over_time=[])], resamples=2)
    compare([*good(), dataclasses.replace(one, ranks_over_time=[junk])], resamples=2)


def test_two_runs_under_one_name_are_not_mixed_up():
    records = good()
    renamed = [changed(r, run="same") for r in records]
    found = compare(renamed, resamples=QUICK)
    assert [c.mean for c in found.cells] == [c.mean for c in compare(records).cells]
    assert found.excluded == ()


def test_agreement_of_ranks():
    up, down = {"a": 1, "b": 2, "c": 3}, {"a": 3, "b": 2, "c": 1}
    assert rank_agreement(up, up) == 1.0
    assert rank_agreement(up, down) == pytest.approx(-1.0)
    assert rank_agreement({"a": 2, "b": 2}, {"a": 2, "b": 2}) == 1.0
    assert rank_agreement({"a": 2, "b": 2}, {"a": 1, "b": 3}) is None
    # A target that one lacks has rank 0 there.
    assert rank_agreement({"a": 1, "b": 2}, {"b": 2}) == pytest.approx(1.0)
    assert rank_agreement({}, {}) is None


def test_share_in_common():
    assert share_in_common({"a": 10, "b": 10}, {"a": 10, "b": 10}) == 1.0
    assert share_in_common({"a": 10}, {"b": 10}) == 0.0
    assert share_in_common({"a": 10, "b": 10}, {"a": 20, "b": 0}) == 0.5
    # Spending a part of the other is not the same as spending the same.
    assert share_in_common({"a": 5}, {"a": 10}) == 0.5
    assert share_in_common({"a": 0}, {}) is None
