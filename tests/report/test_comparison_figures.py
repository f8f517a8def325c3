import math
import re
from dataclasses import replace

import numpy as np
import pytest

from gradrank.evidence.comparison import BudgetInfo, Stability, Tuned
from gradrank.report.comparison.figures_contrasts import contrast_figure, seeds_figure
from gradrank.report.comparison.figures_cost import cost_figures, relative_costs
from gradrank.report.comparison.figures_pareto import pareto_figure
from gradrank.report.comparison.figures_ranks import mean_ranks, ranks_figures
from gradrank.report.comparison.figures_rates import rates_figure, searches
from gradrank.report.comparison.figures_stability import stability_figure
from gradrank.report.comparison.sections import Grown, all_parts, figures_of
from gradrank.report.comparison.strips import gapped, method_marks, reach
from gradrank.report.comparison.tables import main_table, p_text
from gradrank.report.comparison.view import in_order, read_comparison, slug
from gradrank.report.comparison.words import limits, overall, pooled_sentence, sentence
from report import comparison_cases as cases


@pytest.fixture(scope="module")
def view():
    return read_comparison(cases.realistic())


def tuned(task="sst2", method="gard", **values):
    """Return runs: lr_3e4=... is a value at 3e-4."""
    rates = {"low": 1e-4, "middle": 1e-3, "high": 1e-2}
    return tuple(
        Tuned(task, "0.3%", method, rates[name], seed, value)
        for name, group in values.items()
        for seed, value in enumerate(group)
    )


def small_view(runs, lr=1e-3, task="sst2"):
    rng = np.random.default_rng(0)
    outcomes = [cases.outcome(rng, task, "0.3%", "gard", s, 0.8, lr=lr) for s in range(2)]
    comparison = cases.small(outcomes, outcomes)
    if task != "sst2":
        cells = (cases.cell(outcomes, task),)
        changes = {"tasks": {task: cases.TASKS[task]}, "cells": cells, "contrasts": ()}
        comparison = replace(comparison, **changes)
    return read_comparison(replace(comparison, tuned=runs))


def test_contrasts_are_drawn_as_they_are(view):
    figure = contrast_figure(view, "sst2", 1)
    for found in view.source.contrasts:
        if found.task == "sst2" and found.difference is not None:
            drawn = figure.data[found.budget][found.method]
            assert drawn["difference"] == found.difference
            assert (drawn["low"], drawn["high"]) == (found.low, found.high)
            assert drawn["verdict"] == found.verdict
    assert "uniform" not in figure.data["0.3%"]
    assert "beyond the axis" in figure.caption


def test_a_diverged_method_does_not_flatten_the_others():
    usual = [0.001 * i for i in range(1, 11)]
    assert reach(usual) == pytest.approx(1.08 * 0.01)
    assert reach([*usual, 30.0]) < 0.1
    assert reach([]) == reach([0.0]) == 1.0


def test_seeds_show_every_run(view):
    figure = seeds_figure(view, "mrpc", 1)
    assert "pilora" not in figure.data["2570"]
    drawn = figure.data["0.3%"]["gard"]
    row = next(r for r in view.of("mrpc", "0.3%") if r.method == "gard")
    assert drawn == {str(o.seed): o.value for o in row.outcomes}


def test_pareto_has_the_peak_and_hollow_marks_for_unmatched_methods(view):
    figure = pareto_figure(view, "sst2", 1)
    assert figure.data["gard-dynamic"]["parameters"] == [3855, 62208, 497664]
    assert figure.data["full"]["parameters"][0] == 22_700_000
    assert "Hollow marks" in figure.caption
    assert "full †" in figure.svg
    low, mean, high = (figure.data["gard"][key] for key in ("low", "mean", "high"))
    assert all(a < b < c for a, b, c in zip(low, mean, high, strict=True))


def test_costs_are_relative_to_the_reference_of_the_same_task_and_budget(view):
    costs = relative_costs(view)
    assert set(costs["training"]["uniform"]) == {1.0}
    assert len(costs["training"]["gard"]) == 9
    assert len(costs["training"]["pilora"]) == 8
    base = next(r for r in view.rows if r.method == "uniform")
    ours = next(r for r in view.rows if r.method == "full")
    seconds = [np.mean([o.train_seconds for o in r.outcomes]) for r in (ours, base)]
    assert costs["training"]["full"][0] == pytest.approx(seconds[0] / seconds[1])
    assert costs["calibration"]["dora"] == [0.0] * 9
    assert [f.name for f in cost_figures(view)] == [
        "cost-training",
        "cost-calibration",
        "cost-memory",
    ]


def test_unknown_costs_are_left_out():
    rng = np.random.default_rng(0)
    none = dict.fromkeys(("train_seconds", "calibration_seconds", "peak_memory_bytes"))
    runs = [cases.outcome(rng, "sst2", "0.3%", "gard", s, 0.8, **none) for s in range(2)]
    assert cost_figures(read_comparison(cases.small(runs, runs))) == []


@pytest.mark.parametrize(
    ("values", "lr", "edge"),
    [
        ({"low": [0.7], "middle": [0.8], "high": [0.6]}, 1e-3, False),
        ({"low": [0.7], "middle": [0.8], "high": [0.9]}, 1e-2, True),
        ({"low": [0.9], "middle": [0.8], "high": [0.7]}, 1e-4, True),
        ({"low": [0.7], "middle": [0.8], "high": [0.6]}, 1e-4, True),
        ({"middle": [0.8]}, 1e-3, False),
        ({"low": [0.7], "middle": [0.8], "high": [None]}, 1e-3, False),
    ],
)
def test_a_rate_at_the_edge_is_warned_of(values, lr, edge):
    view = small_view(tuned(**values), lr)
    (search,) = searches(view)
    assert search.at_edge is edge
    figure = rates_figure(view, [search], "sst2", 1)
    assert ("⚠" in figure.svg) is edge
    told = [p for p in limits(view, [search]) if p.lead == "Learning rates."]
    assert bool(told) is edge


def test_the_best_rate_of_a_loss_is_the_lowest():
    runs = tuned("wikitext-2", low=[30.0], middle=[27.0], high=[40.0])
    (search,) = searches(small_view(runs, task="wikitext-2"))
    assert search.best == 1e-3


def test_a_rate_that_diverged_for_one_seed_is_not_averaged_over_the_others():
    view = small_view(tuned(low=[0.7, 0.7], middle=[0.8, 0.82], high=[0.99, None]))
    (search,) = searches(view)
    assert search.values == {1e-4: 0.7, 1e-3: pytest.approx(0.81), 1e-2: None}
    assert search.best == 1e-3


def test_ranks_are_means_over_seeds(view):
    (figure,) = ranks_figures(view, "sst2", "uniform:8", 1)
    assert "uniform" not in figure.data["panels"]
    assert "Not drawn, one rank everywhere: uniform and dora." in figure.caption
    row = next(r for r in view.of("sst2", "uniform:8") if r.method == "gard")
    wanted = np.mean([o.ranks["encoder.layer.3.attn.v"] for o in row.outcomes])
    assert mean_ranks(row)["encoder.layer.3.attn.v"] == pytest.approx(wanted)
    at = figure.data["rows"].index("v"), figure.data["columns"].index("3")
    assert figure.data["panels"]["gard"][at[0]][at[1]] == pytest.approx(wanted)


def test_a_target_without_an_adapter_counts_as_rank_zero():
    rng = np.random.default_rng(0)
    ranks = [{"h.0.q": 4, "h.1.q": 2}, {"h.0.q": 2}]
    runs = [
        cases.outcome(rng, "sst2", "0.3%", "gard", s, 0.8, ranks=r) for s, r in enumerate(ranks)
    ]
    row = read_comparison(cases.small(runs, runs)).rows[1]
    assert mean_ranks(row) == {"h.0.q": 3.0, "h.1.q": 1.0}


def test_equal_ranks_everywhere_draw_nothing():
    rng = np.random.default_rng(0)
    same = {"h.0.q": 4, "h.1.q": 4}
    runs = [cases.outcome(rng, "sst2", "0.3%", "gard", s, 0.8, ranks=same) for s in range(2)]
    assert ranks_figures(read_comparison(cases.small(runs, runs)), "sst2", "0.3%", 1) == []


def ranked(**ranks_of):
    """Return a view of one run per method with these ranks."""
    rng = np.random.default_rng(0)
    cells = [
        cases.cell([cases.outcome(rng, "sst2", "0.3%", m, 0, 0.8, ranks=ranks)], method=m)
        for m, ranks in ((m.replace("_", "-"), ranks) for m, ranks in ranks_of.items())
    ]
    methods = tuple(cell.method for cell in cells)
    return read_comparison(cases.small([], cells=tuple(cells), methods=methods, contrasts=()))


@pytest.mark.parametrize("with_uniform", [True, False])
def test_one_large_rank_does_not_give_all_others_one_colour(with_uniform):
    usual = {"h.0.q": 4, "h.1.q": 8, "h.2.q": 12, "h.3.q": 0}
    found = {"gard": usual, "gradient_norm": {**usual, "pooler": 110}}
    if with_uniform:
        found["uniform"] = dict.fromkeys(usual, 8)
    (figure,) = ranks_figures(ranked(**found), "sst2", "0.3%", 1)
    assert figure.data["middle"] == 8
    row = figure.data["levels"]["gard"][figure.data["rows"].index("q")]
    low, middle, high, none = row[:4]
    assert low < middle == 0 < high
    assert none is None
    top = max(v for row in figure.data["levels"]["gradient-norm"] for v in row if v is not None)
    assert top > high
    assert ("uniform: 8" if with_uniform else "median: 8") in figure.svg


def test_methods_beyond_a_dozen_are_drawn_too_ours_first():
    names = [f"b{i}" for i in range(11)]
    ours = ["waterfill", "random_half", "gard_dynamic", "gard"]
    ranks = {"h.0.q": 4, "h.1.q": 8}
    found = ranked(**dict.fromkeys([*names, *ours], ranks))
    drawn = ranks_figures(found, "sst2", "0.3%", 1)
    panels = [list(figure.data["panels"]) for figure in drawn]
    assert [len(each) for each in panels] == [12, 3]
    assert panels[0][:4] == ["gard", "gard-dynamic", "waterfill", "random-half"]
    assert panels[0][4:] + panels[1] == names
    assert len({figure.name for figure in drawn}) == 2
    assert drawn[1].title.endswith("(2 of 2)")
    part = next(part for part in all_parts(found, Grown()) if part.name == "ranks")
    assert [figure.name for figure in figures_of(part.blocks)] == [f.name for f in drawn]


def test_stability_without_a_correlation_is_in_no_figure():
    none = Stability("sst2", "0.3%", "gard", 3, None, None, None, 1.0)
    runs = [cases.outcome(np.random.default_rng(0), "sst2", "0.3%", "gard", 0, 0.8)]
    view = read_comparison(cases.small(runs, runs, stability=(none,)))
    assert stability_figure(view, "sst2", 1) is None
    known = replace(none, mean=0.5, low=0.4, high=0.6)
    view = read_comparison(cases.small(runs, runs, stability=(known,)))
    assert stability_figure(view, "sst2", 1).data["0.3%"]["gard"]["mean"] == 0.5


def test_figures_hold_no_image_and_are_the_same_every_time(view):
    made = [contrast_figure(view, "sst2", 1), pareto_figure(view, "mrpc", 2)]
    again = [contrast_figure(view, "sst2", 1), pareto_figure(view, "mrpc", 2)]
    assert [f.svg for f in made] == [f.svg for f in again]
    assert not any(re.search(r"<image|data:", f.svg) for f in made)


def test_eighty_methods_have_marks_of_their_own():
    runs = [
        cases.cell(
            [cases.outcome(np.random.default_rng(0), "sst2", "0.3%", f"m{i}", 0, 0.5)],
            method=f"m{i}",
        )
        for i in range(80)
    ]
    view = read_comparison(
        cases.empty(
            tasks={"sst2": cases.TASKS["sst2"]},
            budgets=(BudgetInfo("0.3%", {}),),
            methods=tuple(f"m{i}" for i in range(80)),
            cells=tuple(runs),
            reference="m0",
        )
    )
    marks = method_marks(view)
    assert len({(m.color, m.marker) for m in marks.values()}) == 80


def test_segments_become_one_line_with_gaps():
    along, across = gapped([(1.0, 2.0), (3.0, 4.0)], [0, 1])
    assert along[:2] == [1.0, 2.0]
    assert along[3:5] == [3.0, 4.0]
    assert across[:2] == [0, 0]
    assert math.isnan(along[2])
    assert math.isnan(across[5])


def test_the_findings_count_matched_arms_only(view):
    rows = [r for r in view.of("sst2", "2570") if r.contrast and r.cell.matched]
    none = sum(r.verdict == "no evidence" for r in rows)
    text = sentence(view, "sst2", "2570")
    assert text.startswith("Against uniform, at budget 2570 on sst2: ")
    assert f"no evidence of a difference for {none} of {len(rows)} tested arms" in text
    assert "bitfit" not in text
    better = [r.method for r in rows if r.verdict == "better"]
    assert all(method in text for method in better)
    tested = sum(
        r.verdict in {"better", "worse", "no evidence"} and r.cell.matched for r in view.rows
    )
    assert f"Of {tested} tested differences" in overall(view)
    assert "no evidence of a difference for 29 of 33" in pooled_sentence(view)


def test_an_unmatched_arm_is_better_only_with_a_reservation(view):
    contrasts = tuple(
        replace(c, verdict="better", low=c.difference, high=c.difference, p=0.0, p_corrected=0.0)
        if c.method == "full"
        else c
        for c in view.source.contrasts
    )
    changed = read_comparison(replace(view.source, contrasts=contrasts))
    text = sentence(changed, "sst2", "0.3%")
    assert "better, but not held to the budget: full" in text
    assert overall(changed) == overall(view)


def test_larger_methods_and_few_seeds_are_told(view):
    told = {p.lead: p.text for p in limits(view, searches(view))}
    assert "gard-dynamic (up to 1.50 times)" in told["Parameters."]
    assert "3 to 5 seeds" in told["Few seeds."]
    assert "pilora" in told["Learning rates."]
    assert "±" in told["What could be seen."]


def test_without_a_search_the_page_says_that_rates_may_explain_it(view):
    told = limits(read_comparison(replace(view.source, tuned=())), [])
    assert any("no search for learning rates" in p.text for p in told)


def test_small_words():
    assert p_text(0.0004) == "<0.001"
    assert slug(2, "<script>", "0.3%") == "2-script-0-3"
    assert slug(3, "漢字") == "3"
    assert in_order(["c", "a", "b", "a"], ["a", "b"]) == ["a", "b", "c"]


def test_values_beyond_belief_do_not_break_the_table():
    rng = np.random.default_rng(0)
    runs = [cases.outcome(rng, "sst2", "0.3%", "gard", s, 1e30 * (s + 1)) for s in range(3)]
    base = [replace(o, method="uniform", value=float("nan")) for o in runs]
    view = read_comparison(cases.small(runs, base))
    grid = main_table(view)
    assert grid.lines[0].cells[3].text == "–"
    assert grid.lines[1].cells[3].text == "2×10³⁰"
    assert contrast_figure(view, "sst2", 1) is None
    assert seeds_figure(view, "sst2", 1) is not None
