"""The overlap statistics against enumeration, and how runs are labelled and paired."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.core.partition import NeuronPartition
from gradrank.report.overlap import overlap
from gradrank.report.pairs import all_pairs, labelled
from gradrank.report.reading import read_runs
from gradrank.report.sections import gather
from gradrank.report.sections_neurons import agreement
from oracles.overlap import broken_by_enumeration, by_enumeration
from report import neuron_runs

SMALL = [
    [(4, 2, 2)],
    [(5, 1, 3)],
    [(5, 2, 3), (4, 1, 2)],
    [(3, 1, 2), (4, 2, 2), (2, 1, 1)],
    [(1, 1, 1)],
    [(1, 0, 1), (4, 4, 2)],
    [(3, 0, 0)],
]


def first_rows(rows, size):
    return NeuronPartition(rows, 8, 1, (1 << size) - 1)


def measured(targets):
    a = {f"t{i}": first_rows(m, size) for i, (m, size, _) in enumerate(targets)}
    b = {f"t{i}": first_rows(m, size) for i, (m, _, size) in enumerate(targets)}
    return overlap(a, b)


@pytest.mark.parametrize("targets", SMALL)
def test_mean_and_variance_are_those_of_all_pairs_of_sets(targets):
    mean, variance, jaccard = by_enumeration(targets)
    found = measured(targets)
    assert found.expected == pytest.approx(float(mean), abs=1e-12)
    assert found.variance == pytest.approx(float(variance), abs=1e-12)
    assert (found.chance is None) == (jaccard is None)
    if jaccard is not None:
        # What the second-order expansion leaves out is largest for such tiny sets.
        assert found.chance == pytest.approx(float(jaccard), abs=0.035)


def test_the_oracle_tells_a_binomial_law_apart():
    targets = [(5, 2, 3), (4, 1, 2)]
    _, wrong, _ = broken_by_enumeration(targets)
    assert measured(targets).variance != pytest.approx(float(wrong), abs=1e-3)


def test_the_second_order_term_matters_and_helps():
    targets = [(5, 2, 3), (4, 2, 2)]
    _, _, exact = by_enumeration(targets)
    found = measured(targets)
    whole = found.first + found.second
    naive = found.expected / (whole - found.expected)
    assert abs(found.chance - float(exact)) < 0.4 * abs(naive - float(exact))


def test_chance_is_what_random_sets_show():
    rng = np.random.default_rng(0)
    sizes = {"q": (60, 20, 25), "v": (30, 18, 10)}
    drawn = []
    for _ in range(400):
        a, b = (
            {n: NeuronPartition.of(rng.permutation(m) < s[i], 8, 1) for n, (m, *s) in sizes.items()}
            for i in (0, 1)
        )
        drawn.append(overlap(a, b))
    assert np.mean([o.jaccard for o in drawn]) == pytest.approx(drawn[0].chance, abs=0.006)
    zs = [o.z for o in drawn]
    assert np.mean(zs) == pytest.approx(0, abs=0.15)
    assert np.std(zs) == pytest.approx(1, abs=0.12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_overlap_is_symmetric_and_bounded(rows):
    a = {"x": NeuronPartition.of([p for p, _ in rows], 4, 1)}
    b = {"x": NeuronPartition.of([q for _, q in rows], 4, 1)}
    found, back = overlap(a, b), overlap(b, a)
    assert (found.shared, found.expected, found.jaccard) == (
        back.shared,
        back.expected,
        back.jaccard,
    )
    assert found.shared == sum(p and q for p, q in rows)
    if found.jaccard is not None:
        assert 0 <= found.jaccard <= 1
        assert -1e-12 <= found.chance <= 1 + 1e-9


def test_equal_sets_overlap_wholly_and_full_sets_say_nothing():
    same = {"x": NeuronPartition.of([True, False] * 50, 8, 1)}
    assert overlap(same, same).jaccard == 1
    assert overlap(same, same).z == pytest.approx(99**0.5)
    assert overlap(same, same).verdict == "more than chance"
    full, none = ({"x": NeuronPartition.of([flag] * 4, 8, 1)} for flag in (True, False))
    assert overlap(full, full).z is None
    assert overlap(full, full).verdict == "nothing to compare"
    assert overlap(none, none).jaccard is None
    assert overlap(none, none).chance is None
    opposite = {"x": NeuronPartition.of([False, True] * 50, 8, 1)}
    assert overlap(same, opposite).verdict == "less than chance"


def test_only_common_targets_of_one_size_count():
    a = {"x": first_rows(4, 2), "y": first_rows(4, 2), "only": first_rows(8, 8)}
    b = {"x": first_rows(4, 2), "y": first_rows(5, 2)}
    assert (overlap(a, b).targets, overlap(a, b).rows) == (1, 4)
    assert overlap(a, b, ["y"]).targets == 0
    assert overlap({}, b).verdict == "nothing to compare"


def runs_of(records):
    material = gather(read_runs(records))
    return labelled(material.runs), material.layout


def test_labels_hold_what_differs_and_stay_distinct():
    told = [(t, s) for t in ("sst2", "mnli") for s in (0, 1)]
    records = [neuron_runs.pilora(layers=1, task=t, seed=s, maps=0) for t, s in told]
    by_label, _ = runs_of(records)
    assert list(by_label) == [f"{t} · seed {s}" for t, s in told]
    assert [run.label for run in by_label.values()] == list(by_label)
    twins, _ = runs_of([records[0], records[0], replace(records[0], status="failed")])
    assert len(twins) == 3
    assert sum("(failed)" in label for label in twins) == 1
    alone, _ = runs_of(records[:1])
    assert list(alone) == ["pilora"]


def test_runs_of_one_task_agree_more_than_chance_and_random_ones_do_not():
    records = [neuron_runs.pilora(layers=2, seed=s, maps=0) for s in (0, 1)]
    records.append(neuron_runs.pilora(layers=2, rule="random", maps=0))
    pairs = all_pairs(*runs_of(records))
    assert [pair.whole.verdict for pair in pairs] == [
        "more than chance",
        "like chance",
        "like chance",
    ]
    assert [pair.same_way for pair in pairs] == [True, False, False]
    text = agreement(pairs).text
    assert "Of 3 pairs of runs, 1 shares more than chance gives and 2 share about as much" in text


def test_different_tasks_are_told_apart_from_seeds():
    told = [("sst2", 0), ("sst2", 1), ("mnli", 2)]
    records = [neuron_runs.pilora(layers=2, task=t, seed=s, maps=0) for t, s in told]
    pairs = all_pairs(*runs_of(records))
    text = agreement(pairs).text
    assert "Runs of one task and different seeds share" in text
    assert "Runs of different tasks share" in text
    seeds, tasks = pairs[0].whole, pairs[1].whole
    assert seeds.jaccard > tasks.jaccard > tasks.chance
    assert set(pairs[0].types) >= {"q_proj", "down_proj"}
    assert sum(o.shared for o in pairs[0].types.values()) == seeds.shared
