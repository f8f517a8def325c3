import dataclasses
import math
import random

import numpy as np
import pytest

from evidence.evidence_cases import record, simulated
from gradrank.evidence.comparison import Excluded, compare
from gradrank.evidence.significance import holm

QUICK = 200


def patterns(seeds=3, items=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.random(items) < 0.7 for _ in range(seeds)]


def arms(methods=("uniform", "gard"), seeds=3, **changes):
    return [
        record(method, seed, right, **changes)
        for place, method in enumerate(methods)
        for seed, right in enumerate(patterns(seeds, seed=place))
    ]


def cell_of(found, method, task="toy", budget="uniform:1"):
    (cell,) = [c for c in found.cells if (c.task, c.budget, c.method) == (task, budget, method)]
    return cell


def contrast_of(found, method, task="toy"):
    (contrast,) = [c for c in found.contrasts if (c.task, c.method) == (task, method)]
    return contrast


def without(source, *names, **changes):
    """A copy with other fields of the comparison."""
    about = {key: value for key, value in source.comparison.items() if key not in names}
    return dataclasses.replace(source, comparison={**about, **changes})


def test_cells_and_contrasts_by_hand():
    found = compare(arms(), resamples=QUICK)
    ours, theirs = cell_of(found, "gard"), cell_of(found, "uniform")
    values = [np.mean(right) for right in patterns(seed=1)]
    assert ours.mean == pytest.approx(np.mean(values))
    assert ours.sd == pytest.approx(np.std(values, ddof=1))
    assert 0 <= ours.low < ours.mean < ours.high <= 1
    assert (ours.failed, ours.missing, ours.lr, ours.notes) == (0, (), 1e-3, ())
    contrast = contrast_of(found, "gard")
    assert contrast.seeds == (0, 1, 2)
    assert contrast.difference == pytest.approx(ours.mean - theirs.mean)
    assert contrast.low < contrast.difference < contrast.high
    assert contrast.p_corrected == contrast.p
    assert found.methods == ("uniform", "gard")
    assert found.tasks["toy"].items == 40
    assert (found.name, found.about, found.source) == ("sim", "a simulation", "none")
    assert [(b.text, dict(b.parameters)) for b in found.budgets] == [("uniform:1", {"toy": 1000})]
    outcome = ours.outcomes[0]
    assert (outcome.train_seconds, outcome.calibration_seconds) == (2.0, 0.5)
    assert (outcome.peak_memory_bytes, outcome.other) == (100.0, 10)
    assert outcome.ranks == {"a": 1, "b": 1}


def test_a_loss_is_better_where_it_is_less():
    changed = [
        dataclasses.replace(
            r,
            comparison={**r.comparison, "metric": "eval_loss", "higher_is_better": False},
            metrics={},
        )
        for r in simulated(np.random.default_rng(0), {"uniform": 0.0, "gard": 3.0})
    ]
    contrast = contrast_of(compare(changed, resamples=QUICK), "gard")
    assert contrast.difference > 0
    assert contrast.verdict == "better"
    worse = compare(changed, resamples=QUICK, reference="gard")
    assert contrast_of(worse, "uniform").verdict == "worse"
    assert contrast_of(worse, "uniform").difference == pytest.approx(-contrast.difference)


def test_the_order_of_records_makes_no_difference_and_it_repeats():
    records = [
        *simulated(np.random.default_rng(1), {"uniform": 0.0, "gard": 0.5, "random": 0.1}),
        *simulated(np.random.default_rng(2), {"uniform": 0.0, "gard": 0.5}, task="other"),
        record("gard", 9, status="failed", message="no memory"),
        record("gard", 1, phase="tune", lr=1e-2),
        without(record("gard", 7), "seed"),
    ]
    first = compare(records, resamples=QUICK)
    assert compare(records, resamples=QUICK) == first
    random.Random(0).shuffle(records)
    assert compare(records, resamples=QUICK) == first
    assert compare(records, resamples=QUICK, seed=1) != first


def test_other_arms_do_not_change_a_cell():
    rng = np.random.default_rng(3)
    records = simulated(rng, {"uniform": 0.0, "gard": 0.5, "random": 0.1})
    fewer = [r for r in records if r.comparison["method"] != "random"]
    whole = cell_of(compare(records, resamples=QUICK), "gard")
    alone = cell_of(compare(fewer, resamples=QUICK), "gard")
    assert (whole.low, whole.high) == pytest.approx((alone.low, alone.high))


def test_failed_and_diverged_runs_are_counted_named_and_never_averaged():
    records = arms(seeds=4)
    broken = records[-1]
    nll = [None, *broken.items["nll"][1:]]
    records[-1] = dataclasses.replace(broken, items={**broken.items, "nll": nll})
    records[-2] = dataclasses.replace(
        without(records[-2], metric=None, message="ran out of memory"),
        status="failed",
        items=None,
        metrics={},
    )
    found = compare(records, resamples=QUICK)
    cell = cell_of(found, "gard")
    assert [o.seed for o in cell.outcomes] == [0, 1]
    assert (cell.failed, cell.missing) == (2, ())
    assert cell.mean == pytest.approx(np.mean([np.mean(right) for right in patterns(seed=1)[:2]]))
    assert "2 of 4 runs failed" in cell.notes[0]
    assert [f.message for f in found.failures] == [
        "ran out of memory",
        "diverged: the loss of 1 of 40 items is not finite",
    ]
    contrast = contrast_of(found, "gard")
    assert contrast.seeds == (0, 1)
    assert any("runs failed" in note for note in contrast.notes)


def test_a_cell_of_failures_alone_is_there_and_not_tested():
    records = arms()
    records[3:] = [dataclasses.replace(r, status="failed", items=None) for r in records[3:]]
    found = compare(records, resamples=QUICK)
    assert cell_of(found, "gard").mean is None
    assert contrast_of(found, "gard").verdict == "not tested"
    assert contrast_of(found, "gard").difference is None


def test_one_seed_has_no_interval_and_missing_seeds_are_named():
    found = compare(arms()[:4], resamples=QUICK)
    cell, contrast = cell_of(found, "gard"), contrast_of(found, "gard")
    assert (cell.low, cell.high, cell.sd) == (None, None, None)
    assert cell.missing == (1, 2)
    assert "no run with seed 1, 2" in cell.notes
    assert (contrast.verdict, contrast.p, contrast.low) == ("not tested", None, None)
    assert contrast.difference is not None
    assert "one pair of runs" in contrast.notes[0]


def test_arms_that_are_not_held_to_the_budget_are_shown_and_not_tested():
    found = compare([*arms(), *arms(("full",), matched=False)], resamples=QUICK)
    assert found.methods == ("uniform", "gard", "full")
    assert cell_of(found, "full").low is not None
    assert not cell_of(found, "full").matched
    contrast = contrast_of(found, "full")
    assert (contrast.verdict, contrast.notes[0]) == ("not tested", "not held to the budget")
    assert contrast_of(found, "gard").p == contrast_of(found, "gard").p_corrected


def test_a_budget_without_the_reference_is_not_tested():
    found = compare(arms(("gard", "random"), budget_parameters=500), resamples=QUICK)
    assert {c.verdict for c in found.contrasts} == {"not tested"}
    assert "no finished run of uniform" in found.contrasts[0].notes[0]
    assert dict(found.budgets[0].parameters) == {"toy": 500}


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ({"peak": 1000, "final": 1000}, None),
        ({"peak": 1050, "final": 1050}, None),
        ({"peak": 1500, "final": 1000}, "has up to 1,500 parameters on the way, budget 1,200"),
        ({"peak": 1100, "final": 1100}, "1,100 parameters, 10% more than the reference's 1,000"),
        ({"peak": 1000, "final": 890}, "ends with 890 parameters, below 90 %"),
    ],
)
def test_parameters_that_do_not_match_are_noted(counts, note):
    records = arms(budget_parameters=1200)
    records[4] = dataclasses.replace(records[4], trainable_parameters={**counts, "other": 10})
    contrast = contrast_of(compare(records, resamples=QUICK), "gard")
    assert contrast.p is not None
    assert contrast.notes == () if note is None else any(note in text for text in contrast.notes)


def big(records, method, **changes):
    """The same, one arm with other counts of parameters."""
    return [
        dataclasses.replace(r, trainable_parameters={**r.trainable_parameters, **changes})
        if r.comparison["method"] == method
        else r
        for r in records
    ]


def clearly_better(seeds=5):
    return simulated(np.random.default_rng(0), {"uniform": 0.0, "gard": 3.0}, seeds=seeds)


def changed(source, **comparison):
    return dataclasses.replace(source, comparison={**source.comparison, **comparison})


def test_what_exceeds_its_budget_is_shown_and_not_tested():
    records = [changed(r, budget_parameters=1000) for r in clearly_better()]
    assert contrast_of(compare(records, resamples=QUICK), "gard").verdict == "better"
    contrast = contrast_of(compare(big(records, "gard", final=1001), resamples=QUICK), "gard")
    assert contrast.verdict == "not tested"
    assert contrast.p is None
    assert contrast.difference > 0
    assert contrast.notes[0] == "ends with 1,001 parameters, above the budget of 1,000"


def test_what_is_trained_beside_the_adapter_is_compared():
    contrast = contrast_of(
        compare(big(clearly_better(), "gard", other=99), resamples=QUICK), "gard"
    )
    assert contrast.notes == ("trains 99 parameters beside the adapter, the reference 10",)


@pytest.mark.parametrize("lost", ["gard", "uniform"])
def test_who_lost_seeds_is_not_judged_by_the_others(lost):
    """The arm that is left with its good seeds must not win by them, nor lose by the other's."""
    records = clearly_better()
    if lost == "uniform":
        records = simulated(np.random.default_rng(0), {"uniform": 3.0, "gard": 0.0})
    before = "better" if lost == "gard" else "worse"
    assert contrast_of(compare(records, resamples=QUICK), "gard").verdict == before
    failed = [
        dataclasses.replace(r, status="failed", metrics={}, items=None)
        if (r.comparison["method"], r.comparison["seed"]) == (lost, 4)
        else r
        for r in records
    ]
    contrast = contrast_of(compare(failed, resamples=QUICK), "gard")
    assert contrast.p_corrected < 0.05
    assert contrast.lost == ((1, 0) if lost == "gard" else (0, 1))
    assert contrast.verdict == "no evidence"
    assert any(f"not called {before}" in note for note in contrast.notes)
    # The other direction is what survivors say against themselves.
    turned = compare(failed, reference="gard", resamples=QUICK)
    assert contrast_of(turned, "uniform").verdict == "no evidence"


def test_a_pooled_verdict_needs_all_seeds_too():
    records = [
        r
        for task in ("toy", "other")
        for r in simulated(np.random.default_rng(0), {"uniform": 0.0, "gard": 3.0}, task=task)
    ]
    assert [row.verdict for row in compare(records, resamples=QUICK).pooled] == ["better"]
    records[-1] = dataclasses.replace(records[-1], status="failed", metrics={}, items=None)
    (row,) = compare(records, resamples=QUICK).pooled
    assert (row.lost, row.verdict) == ((1, 0), "no evidence")


def test_seeds_that_are_not_there_yet_are_noted_on_the_difference():
    found = compare(clearly_better()[:-1], resamples=QUICK)
    notes = contrast_of(found, "gard").notes
    assert notes == ("not both have run with seed 4",)


def test_rates_that_failed_in_the_search_are_noted():
    trials = [
        record(method, 0, phase="tune", lr=rate, status=status)
        for method, rate, status in (
            ("uniform", 1e-3, "finished"),
            ("uniform", 1e-2, "finished"),
            ("gard", 1e-3, "finished"),
            ("gard", 1e-2, "failed"),
        )
    ]
    notes = contrast_of(compare([*arms(), *trials], resamples=QUICK), "gard").notes
    assert notes == ("learning rates that failed: 1, of the reference 0",)


def test_settings_that_differ_are_noted():
    def with_setting(record, steps, device):
        return dataclasses.replace(
            record, config={"config": {"steps": steps}}, environment={"device": device}
        )

    records = [
        with_setting(r, *((99, "gpu") if r.comparison["method"] == "gard" else (10, "cpu")))
        for r in arms()
    ]
    notes = contrast_of(compare(records, resamples=QUICK), "gard").notes
    assert notes == ("steps: 99; of the reference 10", "device: gpu; of the reference cpu")
    same = [with_setting(r, 10, "cpu") for r in arms()]
    assert contrast_of(compare(same, resamples=QUICK), "gard").notes == ()


def test_unequal_numbers_of_trials_are_noted():
    trials = [record("uniform", 0, phase="tune", lr=rate) for rate in (1e-3, 1e-2)]
    found = compare([*arms(), *trials, record("gard", 0, phase="tune")], resamples=QUICK)
    assert "learning rates tried: 1, for the reference 2" in contrast_of(found, "gard").notes


def test_tuning_runs_are_listed_and_kept_out_of_the_cells():
    trials = [record("gard", 0, np.zeros(8), phase="tune", lr=rate) for rate in (1e-2, 1e-3)]
    trials.append(record("gard", 0, phase="tune", lr=1e-1, status="failed", message="diverged"))
    found = compare([*arms(), *trials], resamples=QUICK)
    assert [(t.lr, t.value) for t in found.tuned] == [(1e-3, 0.0), (1e-2, 0.0), (1e-1, None)]
    assert cell_of(found, "gard") == cell_of(compare(arms(), resamples=QUICK), "gard")
    assert [f.message for f in found.failures] == ["diverged"]


def test_tuning_values_of_records_without_items():
    trial = dataclasses.replace(record("gard", 0, phase="tune"), items=None)
    assert compare([trial]).tuned[0].value == 1.0
    nothing = dataclasses.replace(trial, metrics={})
    assert "neither accuracy nor items" in compare([nothing]).excluded[0].reason
    diverged = dataclasses.replace(trial, metrics={"accuracy": None})
    assert compare([diverged]).tuned[0].value is None


def test_one_family_of_tests_over_tasks_and_budgets():
    records = []
    for place, (task, budget) in enumerate([("a", "10"), ("a", "20"), ("b", "10")]):
        rng = np.random.default_rng(place)
        effects = {"uniform": 0.0, "gard": 0.6, "random": 0.0}
        records += simulated(rng, effects, task=task, budget=budget)
    found = compare(records, resamples=QUICK)
    assert len(found.contrasts) == 6
    corrected = holm([c.p for c in found.contrasts])
    assert [c.p_corrected for c in found.contrasts] == corrected
    for contrast in found.contrasts:
        sure = contrast.p_corrected < 0.05 and not contrast.low <= 0 <= contrast.high
        assert (contrast.verdict in {"better", "worse"}) == sure
    # Budget 20 has one task, so there is nothing to pool.
    assert [(p.budget, p.method, p.tasks) for p in found.pooled] == [
        ("10", "gard", ("a", "b")),
        ("10", "random", ("a", "b")),
    ]


def test_pooling_needs_every_task_and_agrees_with_its_parts():
    records = [
        *simulated(np.random.default_rng(0), {"uniform": 0.0, "gard": 0.8, "random": 0.0}),
        *simulated(np.random.default_rng(1), {"uniform": 0.0, "gard": 0.8}, task="other"),
    ]
    found = compare(records, resamples=QUICK)
    gard, lonely = found.pooled
    assert gard.method == "gard"
    assert gard.verdict == "better"
    assert 0 < gard.low < gard.difference < gard.high
    assert (lonely.method, lonely.verdict, lonely.difference) == ("random", "not tested", None)
    assert lonely.notes == ("not tested on other",)
    parts = []
    for task in ("toy", "other"):
        cells = [c for c in found.cells if c.task == task]
        scale = math.sqrt(np.mean([c.sd**2 for c in cells]))
        parts.append(contrast_of(found, "gard", task).difference / scale)
    assert gard.difference == pytest.approx(np.mean(parts))


def test_identical_arms_are_no_evidence():
    same = patterns()
    records = [record(m, s, right) for m in ("uniform", "gard") for s, right in enumerate(same)]
    contrast = contrast_of(compare(records, resamples=QUICK), "gard")
    assert (contrast.difference, contrast.low, contrast.high, contrast.p) == (0.0, 0.0, 0.0, 1.0)
    assert contrast.verdict == "no evidence"


def test_a_difference_without_any_variation_is_not_tested():
    right = np.ones(8)
    records = [record("uniform", seed, right) for seed in range(3)]
    records += [record("gard", seed, 1 - right) for seed in range(3)]
    contrast = contrast_of(compare(records, resamples=QUICK), "gard")
    assert (contrast.verdict, contrast.difference) == ("not tested", -1.0)
    assert "the same for every seed and item" in contrast.notes[0]


def test_different_rates_within_a_cell_are_noted():
    records = arms()
    records[4] = without(records[4], lr=5e-3)
    found = compare(records, resamples=QUICK)
    assert cell_of(found, "gard").lr is None
    assert "its runs have different learning rates" in contrast_of(found, "gard").notes


def test_what_was_left_out_before_is_kept():
    found = compare([], [("a.json", "no JSON"), Excluded("b.json", "empty")])
    assert found.excluded == (Excluded("a.json", "no JSON"), Excluded("b.json", "empty"))
    assert (found.cells, found.contrasts, found.pooled, found.budgets) == ((), (), (), ())


def test_stability_of_allocations():
    def plan(seed, ranks, method="gard"):
        made = record(method, seed, phase="stability", metric=None)
        return dataclasses.replace(made, items=None, metrics={}, ranks_over_time=[[0, ranks]])

    records = [
        plan(0, {"a": 1, "b": 2, "c": 3}),
        plan(1, {"a": 1, "b": 2, "c": 3}),
        plan(2, {"a": 3, "b": 2, "c": 1}),
        plan(0, {"a": 1, "b": 1}, "flat"),
        plan(1, {"a": 1, "b": 1}, "flat"),
        plan(0, {"a": 1, "b": 1}, "single"),
    ]
    gard, flat = sorted(compare(records).stability, key=lambda s: s.method != "gard")
    assert (gard.pairs, gard.low, gard.high) == (3, pytest.approx(-1.0), 1.0)
    assert gard.mean == pytest.approx((1 - 1 - 1) / 3)
    assert gard.share == pytest.approx((1 + 4 / 6 + 4 / 6) / 3)
    assert (flat.method, flat.mean, flat.share) == ("flat", 1.0, 1.0)


def test_an_undefined_agreement_is_none_at_all_and_not_left_out():
    """GARD's ranks may saturate in one calibration and not in the next: they disagree."""

    def plan(seed, ranks):
        made = record("gard", seed, phase="stability", metric=None)
        return dataclasses.replace(made, items=None, metrics={}, ranks_over_time=[[0, ranks]])

    same = {"a": 2, "b": 2, "c": 2}
    records = [plan(0, same), plan(1, same), plan(2, {"a": 4, "b": 1, "c": 1})]
    (found,) = compare(records).stability
    assert (found.pairs, found.mean, found.low, found.high) == (3, pytest.approx(1 / 3), 0.0, 1.0)


def test_another_metric_loses_neither_failures_nor_allocations():
    """Records of what failed or only allocated name their task's own metric, and have no value."""
    loss = {"metric": "eval_loss", "higher_is_better": False}
    finished = [dataclasses.replace(changed(r, **loss), metrics={}) for r in arms()]
    failed = record("gard", 9, status="failed", message="no memory")
    planned = [
        dataclasses.replace(
            record("gard", seed, phase="stability"),
            items=None,
            metrics={},
            ranks_over_time=[[0, {"a": 1, "b": 2 + seed}]],
        )
        for seed in range(9)
    ]
    found = compare([*finished, dataclasses.replace(failed, items=None), *planned])
    assert found.tasks["toy"].metric == "eval_loss"
    assert found.excluded == ()
    assert cell_of(found, "gard").failed == 1
    assert [row.pairs for row in found.stability] == [36]
