"""What the report says of ranks that moved while a run trained."""

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.record import RunRecord
from gradrank.report import build, figures
from gradrank.report.figures_courses import rank_courses
from gradrank.report.figures_moves import budget_course, moved_bars
from gradrank.report.figures_time import rank_map
from gradrank.report.movement import contradictions, headline, movement
from gradrank.report.sections_time import SHORT, decision_table
from report import history_cases as cases
from report.history_cases import (
    COST,
    ENTRIES,
    LAST,
    MAPS,
    Q0,
    Q1,
    START,
    V0,
    V1,
    prepared,
)
from report.test_report_page import EVIL, Page


@pytest.fixture(scope="module")
def dynamic():
    return cases.dynamic(layers=4, decisions=5)


@pytest.mark.parametrize(
    "entries",
    [[], [[0, START]], [[0, START], [0, LAST]], "none", [[0, START], [5]], [["a", {}], 3]],
)
def test_without_a_history_there_is_no_section(entries):
    record = replace(cases.tiny([], start=START), ranks_over_time=entries)
    page = Page(build([record]))
    assert "history" not in [a.get("id") for t, a in page.tags if t == "section"]
    assert not [f for f in figures([record]) if "time" in f.name or "moved" in f.name]
    assert "final" not in page.text.lower()


def test_a_history_has_its_section_after_the_capacity():
    ids = [a["id"] for t, a in Page(build([cases.tiny(ENTRIES)])).tags if t == "section"]
    assert ids[:3] == ["result", "capacity", "history"]


def test_the_headline_names_share_types_and_steps():
    last = {Q0: 1, V0: 4, Q1: 2, V1: 4}
    entries = [[0, START], [10, {**START, Q0: 1}], [40, last]]
    text = headline(*prepared(cases.tiny(entries)))
    assert text == (
        "Between steps 10 and 40, 24\xa0% of the budget moved, mostly from q to v. All 2 decisions "
        "changed ranks. After step 40 ranks stayed until the end, step 60."
    )


def test_the_headline_does_not_invent_a_flow():
    inside = [[0, START], [10, {Q0: 1, V0: 2, Q1: 5, V1: 2}]]
    assert "between layers of the same module type" in headline(*prepared(cases.tiny(inside)))
    text = headline(*prepared(cases.tiny([[0, START], [10, {**START, Q0: 5}]])))
    assert "grew from 72 to 88 parameters; no target shrank" in text
    text = headline(*prepared(cases.tiny([[0, START], [10, {**START, Q0: 1, V0: 1}]])))
    assert "shrank from 72 to 50 parameters, mostly in q; no target grew" in text


def test_what_went_back_and_forth_is_said():
    back = [[0, START], [10, {**START, Q0: 1, Q1: 5}], [20, START]]
    text = headline(*prepared(cases.tiny(back)))
    assert "every target ended with the rank it started with" in text
    assert "Counted decision by decision, 32\xa0% of the budget moved." in text


@pytest.mark.parametrize("entries", [[[0, START]], [[0, START], [10, START], [20, START]]])
def test_ranks_that_never_changed_are_said_plainly(entries):
    told = [cases.decision(step, 72, 100, 0, 0) for step in (10, 20)]
    record = cases.tiny(entries, told)
    run, layout = prepared(record)
    text = "No rank changed: 2 decisions between steps 10 and 20 kept every rank as it was."
    assert headline(run, layout) == text
    assert text in Page(build([record])).text
    assert rank_map(run, layout).headline == "No rank changed."
    assert moved_bars(run) is None
    assert budget_course(run).data["used"] == [[0, 72], [10, 72], [20, 72]]


def test_one_decision_is_a_whole_section():
    record = cases.tiny(ENTRIES[:2], [cases.decision(10, 56, 100, 12, 3, seconds=0.5, **MAPS)])
    page = Page(build([record]))
    assert "At step 10, 12 % of the budget moved, mostly between layers" in page.text
    assert "It was the only decision." in page.text
    assert "The only decision, at step 10, moved 12" in page.text
    assert "Measuring, deciding and resizing took 0.50" in page.text
    assert {f.name for f in figures([record])} >= {
        "ranks-over-time", "ranks-by-type-over-time", "energy-over-time",
        "effective-rank-over-time", "budget-over-time", "moved-capacity",
    }  # fmt: skip


def test_without_shapes_nothing_is_counted_in_parameters():
    record = replace(cases.tiny(ENTRIES), plan=None)
    run, layout = prepared(record)
    assert "the rank of 3 of 4 targets changed; without shapes" in headline(run, layout)
    assert budget_course(run) is None
    assert moved_bars(run).data == {"moved": [], "changed": [[10, 3], [30, 1]]}
    assert run.parameters == record.trainable_parameters["final"]
    assert not [f for f in figures([record]) if f.name == "budget"]


def test_decisions_without_ranks_still_show_what_they_tell():
    told = [cases.decision(10, 56, 100, 12, 3, **MAPS), cases.decision(20, 60, 100, 4, 1)]
    run, layout = prepared(cases.tiny([], told, start=START))
    assert rank_map(run, layout) is None
    assert rank_courses(run, layout) is None
    assert budget_course(run).data["used"] == [[10, 56], [20, 60]]
    assert "the record does not tell which" in headline(run, layout)


def test_a_record_that_contradicts_itself_is_called_out():
    told = [cases.decision(10, 57, 100, 12, 3), cases.decision(30, 62, 100, 6, 2)]
    text = contradictions(prepared(cases.tiny(ENTRIES, told))[0].history)
    assert "(step 10 and 30)" in text
    assert "it tells 57 parameters in use, the ranks give 56." in text
    assert text in Page(build([cases.tiny(ENTRIES, told)])).text
    honest = [cases.decision(10, 56, 100, 12, 3), cases.decision(30, 62, 100, 6, 1)]
    assert contradictions(prepared(cases.tiny(ENTRIES, honest))[0].history) == ""


def test_existing_figures_show_the_final_ranks_and_say_so(dynamic):
    by_name = {figure.name: figure for figure in figures([dynamic])}
    assert by_name["rank-heat-map"].title == "Final rank of every target"
    assert by_name["rank-histogram"].title == "Distribution of final ranks"
    assert by_name["rank-profile"].title == "Final rank by layer"
    assert by_name["budget"].title == "How the parameter budget is spent, final ranks"
    final = dynamic.ranks_over_time[-1][1]
    shown = by_name["rank-profile"].data["down_proj"]["gard-dynamic"]["ranks"]
    assert shown == [final[f"model.layers.{i}.mlp.down_proj"] for i in range(4)]
    assert shown != [8, 8, 8, 8]
    page = Page(build([dynamic]))
    assert "Where the capacity went (final ranks)" in page.text
    assert "rank at the start, gard-dynamic" in page.text


def test_the_demo_history_adds_up(dynamic):
    run, layout = prepared(dynamic)
    assert contradictions(run.history) == ""
    start, final = dynamic.ranks_over_time[0][1], dynamic.ranks_over_time[-1][1]
    price = {name: p.d_in + p.d_out for name, p in run.planned.items()}
    given = taken = 0
    for name in start:
        rise = (final[name] - start[name]) * price[name]
        given, taken = given + max(rise, 0), taken + max(-rise, 0)
    moved = movement(run.history, layout)
    assert (moved.given, moved.taken) == (given, taken)
    assert moved.gross == sum(entry["moved"] for entry in dynamic.decisions)
    assert sum(moved.by_type.values()) == given - taken
    assert run.parameters == dynamic.decisions[-1]["parameters"]
    assert budget_course(run).data["over"] == []
    share = f"{100 * given / dynamic.decisions[0]['budget']:.2f}\xa0% of the budget moved"
    assert share in headline(run, layout)


RANKS = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=2, max_size=6)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(RANKS)
def test_sums_equal_a_count_target_by_target(table):
    entries = [[10 * i, dict(zip(cases.TINY, row, strict=True))] for i, row in enumerate(table)]
    run, layout = prepared(cases.tiny(entries))
    moved = movement(run.history, layout)
    gross, moving = 0, []
    for i in range(1, len(table)):
        rises = [max(0, b - a) for a, b in zip(table[i - 1], table[i], strict=True)]
        gross += sum(rise * COST[name] for rise, name in zip(rises, cases.TINY, strict=True))
        if table[i] != table[i - 1]:
            moving.append(10 * i)
    assert (moved.gross, list(moved.moving)) == (gross, moving)
    assert moved.changed == sum(a != b for a, b in zip(table[0], table[-1], strict=True))
    assert moved.dropped == sum(a > 0 and b == 0 for a, b in zip(table[0], table[-1], strict=True))
    text = headline(run, layout)
    assert ("No rank changed" in text) == (not moving)
    found = re.search(r"mostly from (\w) to (\w)", text)
    if found:
        assert moved.by_type[found[1]] * -2 >= moved.taken
        assert moved.by_type[found[2]] * 2 >= moved.given


def test_entries_and_decisions_may_come_in_any_order(dynamic):
    mixed = replace(
        dynamic,
        ranks_over_time=random.Random(1).sample(dynamic.ranks_over_time, 6),
        decisions=dynamic.decisions[::-1],
    )
    assert [f.data for f in figures([mixed])] == [f.data for f in figures([dynamic])]


def test_each_dynamic_run_has_its_own_block(dynamic):
    other = cases.dynamic(layers=4, decisions=3, seed=2, name="other")
    static = cases.tiny([[0, START]], name="static")
    names = [figure.name for figure in figures([static, dynamic, other])]
    assert names.count("ranks-over-time") == names.count("ranks-over-time-2") == 1
    assert "ranks-over-time-3" not in names
    page = Page(build([static, dynamic, other]))
    assert "gard-dynamic (seed 0)." not in page.text
    assert "gard-dynamic. Between steps" in page.text
    assert "other. Between steps" in page.text
    assert "All 3 decisions of other" in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)


def test_a_long_table_starts_folded_and_holds_every_decision():
    long = cases.dynamic(layers=2, decisions=SHORT + 1)
    table = decision_table(prepared(long)[0])
    assert table.interactive
    steps = [row[0].sort for row in table.rows]
    assert steps == [entry["step"] for entry in long.decisions]
    heads = [cell.text for cell in table.head]
    column = heads.index("parameters moved")
    assert [row[column].sort for row in table.rows] == [e["moved"] for e in long.decisions]
    assert not decision_table(prepared(cases.dynamic(layers=2, decisions=SHORT))[0]).interactive
    assert "All 13 decisions</summary>" in build([long])


def test_hostile_names_stay_text():
    names = [EVIL, f"h.0.{EVIL}", "h.1.\x00\u202e\ud800", "h.0.$\\frac{1}$"]
    ranks = dict.fromkeys(names, 2)
    told = cases.decision(
        10, effective_rank=dict.fromkeys(names, 2.0), energy=dict.fromkeys(names, 0.5)
    )
    record = RunRecord(
        EVIL, "train", ranks_over_time=[[0, ranks], [10, {**ranks, EVIL: 5}]], decisions=[told]
    )
    html = build([record])
    page = Page(html)
    assert html.count("<script") == 1
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "rose most" in page.text
    html.encode("utf-8")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
NAME = st.sampled_from(["h.0.q", "h.1.q", "h.0.v", "", "head"])
NUMBERS = st.dictionaries(NAME, JSON | st.floats() | st.integers(0, 40), max_size=4)
STEP = st.integers(0, 40) | JSON
ENTRY = st.tuples(STEP, st.dictionaries(NAME, st.integers(0, 9) | JSON, max_size=4)).map(list)
KEYS = ("step", "parameters", "budget", "moved", "changed", "seconds")
DECISION = st.fixed_dictionaries(
    {"step": st.integers(0, 40)},
    optional={
        **dict.fromkeys(KEYS[1:], st.integers(0, 10**6) | JSON),
        **dict.fromkeys(("effective_rank", "smoothed", "energy"), NUMBERS | JSON),
    },
)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.lists(ENTRY | JSON, max_size=5) | JSON, st.lists(DECISION | JSON, max_size=5) | JSON)
def test_no_history_breaks_the_page(entries, decisions):
    record = cases.tiny([], start=START)
    Page(build([replace(record, ranks_over_time=entries, decisions=decisions)]))
    bare = RunRecord("r", "train", ranks_over_time=entries, decisions=decisions)
    Page(build([bare]))


def test_a_history_survives_its_file(tmp_path):
    record = cases.tiny(ENTRIES, [cases.decision(10, 56, 100, 12, 3, **MAPS)])
    record.save(tmp_path / "record.json")
    assert build([RunRecord.load(tmp_path / "record.json")]) == build([record])
