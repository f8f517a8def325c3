"""What the report says of runs that prune: budgets that fall, rank 0, gaps, importance."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.record import RunRecord
from gradrank.report import build, figures
from gradrank.report.figures_budget import budget_bar
from gradrank.report.figures_gap import completeness
from gradrank.report.figures_importance import importance_against_rank
from gradrank.report.figures_moves import budget_course, moved_bars
from gradrank.report.figures_ranks import rank_heat_map
from gradrank.report.figures_types import type_means
from gradrank.report.movement import contradictions, headline, movement
from gradrank.report.pruned import gap_warning
from gradrank.report.reading import read_runs
from gradrank.report.sections import gather
from gradrank.report.sections_time import decision_table
from gradrank.report.tables import cost_table, results_table
from gradrank.report.verdict import verdict
from report import history_cases, pruned_runs, report_cases
from report.history_cases import COST, ENTRIES, MAPS, Q0, Q1, START, V0, V1, decision, prepared
from report.pruned_runs import NARROW, STEPS, WIDE, facts, price, tiny
from report.test_report_page import EVIL, Page

IMPORTANCE = ({Q0: 2.0, V0: 4.0, Q1: 3.0, V1: 0.5}, {Q0: 0.0, V0: 4.0, Q1: -3.0})
TOLD = [{"importance": each} for each in IMPORTANCE]


@pytest.fixture(scope="module")
def igu():
    return pruned_runs.pruned("igu", layers=4, steps=200)


@pytest.fixture(scope="module")
def direction():
    return pruned_runs.pruned("igu-direction", layers=4, steps=200)


def cells(table):
    """Return a table as {head: texts}."""
    return {h.text: [row[i].text for row in table.rows] for i, h in enumerate(table.head)}


def test_the_curve_that_falls_is_drawn_with_use_and_what_was_asked_for():
    figure = budget_course(prepared(tiny())[0])
    assert [price(ranks) for _, ranks in STEPS] == [112, 70, 32]
    assert figure.data == {
        "used": [[0, 112], [10, 70], [30, 32]],
        "budget": [[10, 71], [30, 32]],
        "slack": [[10, 1], [30, 0]],
        "over": [],
        "asked": 32,
    }
    assert figure.headline == (
        "Training began with 3.5 times the budget of 32 parameters and is within it from step 30 "
        "on. No decision leaves more in use than it allows."
    )
    assert ">asked for</text>" in figure.svg
    assert "binds at the end only" in figure.caption


@pytest.mark.parametrize(
    "record",
    [
        tiny(),
        tiny(told=False),
        tiny(entries=[[0, WIDE], [30, NARROW]]),
        tiny(entries=STEPS[:2], status="interrupted"),
        replace(tiny(), plan=None),
        pruned_runs.pruned("adalora", layers=2, steps=100),
    ],
)
def test_nothing_claims_that_the_budget_always_held(record):
    html = build([record])
    assert not re.search(r"never (exceeded|more than|above)|always spent", html)
    assert "over budget</span>" not in html
    assert "edited or is damaged" not in html


def test_a_budget_that_holds_throughout_is_still_said_to():
    text = budget_course(prepared(history_cases.tiny(ENTRIES))[0]).headline
    assert text.startswith("The budget is never exceeded")
    assert not prepared(history_cases.tiny(ENTRIES))[0].falls


def test_more_in_use_than_a_decision_allows_is_named():
    record = tiny()
    record.decisions[0]["budget"] = 60
    run = prepared(record)[0]
    figure = budget_course(run)
    assert figure.data["over"] == [10]
    assert "After step 10 more is in use than allowed, by up to 10 parameters." in figure.headline
    flags = [cell.flag for row in decision_table(run).rows for cell in row if cell.flag]
    assert flags == ["over budget"]


def test_without_told_allowances_only_start_and_end_are_judged():
    run = prepared(tiny(told=False))[0]
    figure = budget_course(run)
    assert run.falls
    assert figure.data["budget"] == figure.data["slack"] == []
    assert "What was allowed on the way is not recorded." in figure.headline
    high = replace(tiny(told=False), ranks_over_time=[list(e) for e in STEPS[:2]])
    assert "and ends 38 above it" in budget_course(prepared(high)[0]).headline
    assert "was not brought down to it" in budget_bar(*_material(high)).caption


def test_a_run_that_was_stopped_on_the_way_down_is_not_called_damaged():
    stopped = tiny(entries=STEPS[:2], status="interrupted")
    run = prepared(stopped)[0]
    text = "Training began with 3.5 times the budget of 32 parameters and stopped (interrupted)"
    assert f"{text} while still 38 above it." in budget_course(run).headline
    assert "was stopped on the way down to its budget" in budget_bar(*_material(stopped)).caption
    assert movement(run.history, prepared(stopped)[1]).whole == 32


def test_ranks_that_fall_at_one_budget_are_no_pruning():
    entries = [[0, START], [10, {**START, Q0: 1}]]
    assert not prepared(history_cases.tiny(entries))[0].falls
    told = [decision(10, 56, 80, 0, 1), decision(20, 56, 80, 0, 0)]
    assert not prepared(history_cases.tiny(entries, told, budget=75))[0].falls


def test_what_was_taken_away_is_counted_from_ranks():
    run = prepared(tiny())[0]
    figure = moved_bars(run)
    assert figure.data == {"taken": [[10, 42], [30, 38]], "changed": [[10, 3], [30, 3]]}
    assert figure.title == "Capacity taken away by each decision"
    assert figure.headline == (
        "The largest decision, at step 10, took 42 parameters, 52\xa0% of all that was taken away."
    )
    found = cells(decision_table(run))
    assert found["parameters taken away"] == ["42", "38"]
    assert found["allowed"] == ["71", "32"]
    assert not {"parameters moved", "share of the budget", "budget"} & set(found)


def test_the_words_on_a_pruning_run():
    run, layout = prepared(tiny())
    assert headline(run, layout) == (
        "Between steps 10 and 30, the adapter shrank from 112 to 32 parameters, mostly in q; no "
        "target grew. 2 targets lost the whole adapter. All 2 decisions changed ranks. After step "
        "30 ranks stayed until the end, step 60."
    )
    text = Page(build([tiny()])).text
    assert "Training began with 3.5 times the budget of 32 parameters" in text
    assert contradictions(run.history) == ""


def test_means_by_module_type_from_start_to_end():
    runs, layout = _material(tiny())
    figure = type_means(runs, layout)
    assert figure.data["igu"] == {
        "q": {"end": 0.5, "targets": 2, "zeros": 1, "start": 4.0},
        "v": {"end": 2.0, "targets": 2, "zeros": 1, "start": 4.0},
    }
    assert figure.headline == "igu: most in v (mean rank 2), least in q (0.5)."
    assert ">0.5, 1 of 2 at 0</text>" in figure.svg
    heat = rank_heat_map(runs, layout)
    assert heat.data["panels"] == {"igu": [[0.0, 1.0], [4.0, 0.0]]}
    assert "At the start every target of igu had rank 4." in heat.caption


def test_a_varied_start_has_a_panel_of_its_own():
    entries = [[0, {**WIDE, V1: 2}], *STEPS[1:]]
    heat = rank_heat_map(*_material(tiny(told=False, entries=entries)))
    assert heat.data["panels"] == {
        "igu, at the start": [[4.0, 4.0], [4.0, 2.0]],
        "igu": [[0.0, 1.0], [4.0, 0.0]],
    }
    assert "At the start" not in heat.caption


def test_static_runs_have_means_by_type_without_a_start():
    uniform, gard, _ = report_cases.demo_records(4)
    runs, layout = _material(uniform, gard)
    figure = type_means(runs, layout)
    assert set(figure.data) == {"uniform", "gard"}
    assert figure.data["uniform"]["q_proj"] == {"end": 8.0, "targets": 4, "zeros": 0}
    assert figure.title == "Mean rank by module type"
    assert "Hollow" not in figure.caption
    assert type_means(*_material(uniform)) is None


def test_equal_ends_with_other_starts_are_kept_apart():
    wide = tiny()
    later = replace(tiny(told=False, entries=[[0, {**WIDE, Q1: 3}], STEPS[-1]]), name="adalora")
    runs, layout = _material(wide, later)
    assert list(type_means(runs, layout).data) == ["igu", "adalora"]


def test_the_gap_is_drawn_against_its_tolerance():
    record = tiny(extra=[facts(-0.12, -0.1), facts(-0.205, -0.2)])
    record.plan["method"]["options"] = {"tolerance": 0.05}
    run = prepared(record)[0]
    figure = completeness(run)
    assert figure.data["attributed"] == [[10, -0.12], [30, -0.205]]
    assert figure.data["loss_change"] == [[10, -0.1], [30, -0.2]]
    assert figure.data["gap"][0][1] == pytest.approx(0.2)
    assert figure.data["tolerance"] == 0.05
    assert figure.headline == (
        "The gap is above 5.00\xa0% at 1 of 2 decisions; the largest is 20\xa0%, at step 10."
    )
    assert "the method's tolerance, 5.00\xa0%" in figure.caption
    text = gap_warning(run).text
    assert text.startswith("At 1 of 2 decisions attributions miss the change of the loss by more ")
    assert "they add up to −0.12 nats, and the loss changed by −0.1." in text
    assert text in Page(build([record])).text.replace(" %", "\xa0%")
    flags = [cell.flag for row in decision_table(run).rows for cell in row if cell.flag]
    assert flags == ["large"]


def test_a_gap_within_its_tolerance_is_no_warning():
    run = prepared(tiny(extra=[facts(-0.101, -0.1), facts(-0.2, -0.2)]))[0]
    assert gap_warning(run) is None
    figure = completeness(run)
    assert figure.headline == (
        "At all 2 decisions the gap is within 10\xa0%; at most it is 1.00\xa0%."
    )
    assert "no tolerance is recorded" in figure.caption


def test_gaps_far_apart_are_drawn_logarithmically():
    run = prepared(tiny(extra=[facts(-0.1, -0.1), facts(-2e5, -0.2, gap=1e6)]))[0]
    figure = completeness(run)
    assert figure.data["gap"] == [[10, 0.0], [30, 1e6]]
    assert "the largest is 1×10⁶ times, at step 30" in figure.headline
    assert re.search(r">10\S*×</text>", figure.svg)


def test_a_gap_is_computed_where_it_is_not_told():
    record = tiny(extra=[{"attributed": -0.3, "loss_change": -0.2}, {"gap": 0.02}])
    figure = completeness(prepared(record)[0])
    assert figure.data["gap"] == [[10, pytest.approx(0.5)], [30, 0.02]]
    assert figure.data["attributed"] == [[10, -0.3]]
    assert completeness(prepared(tiny())[0]) is None


def test_importance_is_drawn_against_the_ranks_that_it_left():
    figure = importance_against_rank(*prepared(tiny(extra=TOLD)))
    # Q0 kept nothing, and V1 neither kept nor told anything.
    assert figure.data["step"] == 30
    assert figure.data["points"] == {"q": [[1, -3.0]], "v": [[4, 4.0]]}
    assert figure.data["mean"] == pytest.approx(0.2)
    assert "Not drawn: 2 targets that kept none." in figure.caption
    only = importance_against_rank(*prepared(tiny(extra=TOLD[:1])))
    assert only.data["step"] == 10
    assert only.data["spearman"] == pytest.approx(math.sqrt(0.6))


def test_importance_over_many_decades_has_a_logarithmic_axis():
    wide = {"importance": {V0: 4e6, Q1: 1.0}}
    data = importance_against_rank(*prepared(tiny(extra=[{}, wide]))).data
    assert data["log"]
    signed = {"importance": {V0: 4e-7, Q1: -1e-8}}
    figure = importance_against_rank(*prepared(tiny(extra=[{}, signed])))
    assert not figure.data["log"]
    assert "× 10⁻⁷" in figure.svg


def test_a_plan_of_equal_scores_explains_no_rank(igu):
    names = [figure.name for figure in figures([igu])]
    assert "score-rank" not in names
    assert "importance-rank" in names


def test_scoring_passes_are_counted(igu, direction):
    runs, _ = _material(igu, pruned_runs.pruned("adalora", layers=4, steps=200))
    found = cells(cost_table(runs))
    last = igu.decisions[-1]["passes"]
    assert found["scoring passes"] == [f"{last:g}", "0"]
    assert found["scoring passes per step"] == [f"{last / 200:.3g}", "0"]
    text = Page(build([igu, direction])).text
    assert f"Scoring took {last:g} passes of its own" in text
    assert "Measuring, deciding and resizing" not in text
    assert "took no pass of its own" in Page(build([runs[1].record])).text
    old = cells(cost_table(_material(history_cases.tiny(ENTRIES))[0]))
    assert "scoring passes" not in old


def test_the_peak_is_that_of_the_ranks_and_not_only_what_is_told(igu):
    low = replace(igu, trainable_parameters={"peak": 5, "final": 5})
    runs, _ = _material(low)
    start = 16 * sum(sum(shape) for shape in report_cases.shapes(4).values())
    assert runs[0].peak == start
    assert cells(results_table(runs))["most in use"] == [f"{start:,}"]


def test_a_comparison_says_who_was_larger_while_training(igu):
    uniform = report_cases.demo_records(4)[0]
    told = {p.lead: p.text for p in verdict(_material(uniform, igu)[0])}
    text = told["Larger while training:"]
    assert text.startswith("igu used up to")
    assert "(2 times its final size, pruned down to it by step" in text
    assert "The runs do not have the same size." not in told
    other = pruned_runs.pruned("adalora", layers=4, steps=200)
    gard = history_cases.dynamic(layers=4, decisions=3)
    for equals in ((igu, other), (uniform, gard)):
        leads = [paragraph.lead for paragraph in verdict(_material(*equals)[0])]
        assert "Larger while training:" not in leads


def test_the_realistic_runs_add_up(igu, direction):
    for record in (igu, direction):
        run, layout = prepared(record)
        assert contradictions(run.history) == ""
        assert run.falls
        assert budget_course(run).data["over"] == []
        start = price_of(record, record.ranks_over_time[0][1])
        end = price_of(record, record.ranks_over_time[-1][1])
        assert sum(value for _, value in moved_bars(run).data["taken"]) == start - end
        assert movement(run.history, layout).taken == start - end
        assert run.parameters == end <= run.budget < run.peak == start


def price_of(record, ranks):
    targets = record.plan["targets"]
    return sum(r * (targets[n]["d_in"] + targets[n]["d_out"]) for n, r in ranks.items())


def test_records_of_all_kinds_share_a_page(igu, direction):
    old = history_cases.tiny(ENTRIES, name="old gard-dynamic")
    new = history_cases.tiny(ENTRIES, [decision(10, 56, 100, 12, 3, **MAPS)], name="new")
    single = replace(tiny(entries=[[0, WIDE], [30, NARROW]]), name="single")
    none = replace(tiny(told=False), name="no decisions")
    zero = tiny(entries=[[0, WIDE], [10, dict.fromkeys(WIDE, 0)]], extra=[{"importance": {}}])
    records = [igu, direction, old, new, single, none, replace(zero, name="nothing left")]
    page = Page(build(records))
    for record in records:
        assert f"{record.name}." in page.text
    assert "It was the only decision." in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    drawn = {"completeness-2", "importance-rank", "importance-rank-2", "budget-over-time-7"}
    assert {f"fig-{name}" for name in drawn} <= set(ids)


def test_a_pruned_record_survives_its_file(tmp_path, direction):
    direction.save(tmp_path / "record.json")
    assert build([RunRecord.load(tmp_path / "record.json")]) == build([direction])


def test_hostile_names_stay_text_in_the_new_figures():
    names = [EVIL, f"h.0.{EVIL}", "h.1.\x00\u202e\ud800", "h.0.$\\frac{1}$"]
    told = facts(-3.0, -1.0) | {"importance": dict.fromkeys(names, 2.0)}
    record = RunRecord(
        EVIL,
        "train",
        ranks_over_time=[
            [0, dict.fromkeys(names, 4)],
            [10, dict(zip(names, range(4), strict=True))],
        ],
        decisions=[decision(10, 9, 20, **told)],
    )
    html = build([record])
    page = Page(html)
    assert html.count("<script") == 1
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert {"completeness", "importance-rank", "rank-by-type"} <= {
        figure.name for figure in figures([record])
    }


ANY = st.floats() | st.floats(-1e100, 1e100) | st.integers(-(10**20), 10**20) | st.none()
RANKS = st.fixed_dictionaries(dict.fromkeys(WIDE, st.integers(0, 5)))
FACTS = st.fixed_dictionaries(
    {"step": st.integers(1, 40)},
    optional={
        **dict.fromkeys(("passes", "attributed", "loss_change", "gap", "seconds"), ANY),
        **dict.fromkeys(("budget", "parameters"), st.integers(0, 200) | st.none()),
        "importance": st.dictionaries(st.sampled_from([*WIDE, "head"]), ANY, max_size=5),
    },
)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.lists(RANKS, max_size=4), st.lists(FACTS, max_size=4))
def test_no_pruning_record_breaks_the_page(table, decisions):
    entries = [[10 * i, ranks] for i, ranks in enumerate(table)]
    Page(build([replace(tiny(), ranks_over_time=entries, decisions=decisions)]))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(RANKS, min_size=2, max_size=5), st.integers(1, 130))
def test_where_a_run_settles_equals_a_search_from_the_end(table, asked):
    entries = [[10 * i, ranks] for i, ranks in enumerate(table)]
    history = prepared(tiny(told=False, entries=entries, budget=asked))[0].history
    used = [sum(rank * COST[name] for name, rank in ranks.items()) for ranks in table]
    within = [
        step for i, (step, _) in enumerate(entries) if all(value <= asked for value in used[i:])
    ]
    # An entry that changed nothing is still an entry: the figure draws it as a step.
    assert history.settled == (within[0] if within else None)
    assert history.peak == max(used)
    falling = all(b <= a for a, b in pairwise(used))
    assert history.falls == (used[0] > asked and falling)
    assert math.isclose(sum(e.taken - e.moved for e in history.events), used[0] - used[-1])


def _material(*records):
    material = gather(read_runs(list(records)))
    return material.runs, material.layout
