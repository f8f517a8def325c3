"""What the report draws of ranks that moved while a run trained."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import Normalize, to_hex

from gradrank.report import write
from gradrank.report.figures_courses import effective_courses, rank_courses
from gradrank.report.figures_moves import budget_course, moved_bars
from gradrank.report.figures_time import energy_map, rank_map
from gradrank.report.reading import read_runs
from gradrank.report.sections import gather
from gradrank.report.sections_time import decision_table
from gradrank.report.style import colour_map
from gradrank.report.timemap import evenly, lanes
from report import history_cases as cases
from report.history_cases import (
    ENTRIES,
    MAPS,
    Q0,
    Q1,
    START,
    V0,
    V1,
    cost,
    prepared,
)


def test_ranks_are_drawn_as_recorded_and_missing_targets_are_zero():
    data = rank_map(*prepared(cases.tiny(ENTRIES))).data
    assert data["targets"] == [Q0, Q1, V0, V1]
    assert data["edges"] == [0, 10, 30, 60]
    assert data["cells"] == [[3, 1, 1], [3, 3, 3], [2, 4, 5], [2, 0, 0]]


def test_every_cell_of_the_map_has_its_place_and_colour():
    svg = rank_map(*prepared(cases.tiny(ENTRIES))).svg
    # Cells are the only shapes of their colour with an edge of that colour.
    found = {}
    for path, fill in re.findall(
        r'<path d="([^"]*)"[^>]*style="fill:(#\w+);stroke:\2;[^"]*linejoin', svg
    ):
        boxes = re.findall(r"M(\S+) (\S+?)H(\S+?)V(\S+?)H\1z", path)
        found[fill] = [tuple(map(float, box)) for box in boxes]
    assert {round(abs(b[3] - b[1])) for f in found.values() for b in f} == {18}
    left, right = (
        min(b[0] for f in found.values() for b in f),
        max(b[2] for f in found.values() for b in f),
    )
    top = min(b[1] for f in found.values() for b in f)
    colour = {r: to_hex(colour_map("viridis")(Normalize(1, 5)(r))) for r in (0, 1, 2, 3, 4, 5)}
    drawn = sorted(
        (round((y - top) / 18), round(60 * (a - left) / (right - left)), rank)
        for rank, fill in colour.items()
        for a, y, _, _ in found[fill]
    )
    # (row, first step, rank); the rows of v stand 4 pixels lower, which rounds away.
    assert drawn == [
        (0, 0, 3), (0, 10, 1), (1, 0, 3), (2, 0, 2), (2, 10, 4), (2, 30, 5), (3, 0, 2), (3, 10, 0)
    ]  # fmt: skip


def test_dropped_targets_have_the_colour_of_rank_zero():
    assert "#eeeeee" in rank_map(*prepared(cases.tiny(ENTRIES))).svg
    kept = [[0, START], [10, {**START, Q0: 1}]]
    assert "#eeeeee" not in rank_map(*prepared(cases.tiny(kept))).svg


def test_courses_hold_mean_and_span_per_module_type():
    data = rank_courses(*prepared(cases.tiny(ENTRIES))).data
    assert data["q"] == {
        "steps": [0, 10, 30],
        "mean": [3, 2, 2],
        "low": [3, 1, 1],
        "high": [3, 3, 3],
    }
    assert data["v"]["mean"] == [2, 2, 2.5]
    assert data["v"]["low"] == [2, 0, 0]


def test_effective_ranks_hold_window_and_smoothed():
    record = cases.tiny(ENTRIES, [cases.decision(10, **MAPS), cases.decision(20)])
    figure = effective_courses(*prepared(record))
    assert figure.data["q"]["window"] == {"steps": [10], "mean": [4], "low": [3], "high": [5]}
    assert figure.data["q"]["smoothed"]["mean"] == [4.25]
    assert figure.headline == "The mean over all targets is 3.33 at step 10."


def test_energy_is_logarithmic_and_without_gradient_empty():
    later = {**MAPS, "energy": {Q0: 0.02, Q1: 0.485, V0: 0.0}}
    record = cases.tiny(ENTRIES, [cases.decision(10, **MAPS), cases.decision(30, **later)])
    figure = energy_map(*prepared(record))
    assert figure.data["targets"] == [Q0, Q1, V0]
    assert figure.data["cells"][0] == pytest.approx([-2, -1.69897], abs=1e-5)
    assert figure.data["cells"][2] == [None, None]
    assert figure.data["edges"] == [0, 20, 40]
    assert "energy fell by 50\xa0% from step 10 on" in figure.headline
    assert "At step 30 the strongest target has 24 times" in figure.headline


def test_a_window_without_gradient_leaves_a_gap():
    energies = (0.5, 0.0, 0.5, 0.5)
    told = [cases.decision(10 * i + 10, energy={Q0: e}) for i, e in enumerate(energies)]
    figure = energy_map(*prepared(cases.tiny(ENTRIES, told)))
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-width:0.8;stroke-linejoin', figure.svg)
    boxes = [tuple(map(float, b)) for b in re.findall(r"M(\S+) \S+?H(\S+?)V", path)]
    (first, end), (again, last) = boxes
    assert again - end == pytest.approx(end - first, abs=0.05)  # one column is missing
    assert last - again == pytest.approx(2 * (end - first), abs=0.05)  # and two are drawn as one


def test_the_budget_is_drawn_from_the_ranks_where_nothing_is_told():
    figure = budget_course(prepared(cases.tiny(ENTRIES))[0])
    used = [cost(ranks) for _, ranks in ENTRIES]
    assert used == [72, 56, 62]
    assert figure.data["used"] == [[0, 72], [10, 56], [30, 62]]
    assert figure.data["budget"] == [[0, 100], [10, 100], [30, 100]]
    assert figure.data["slack"] == [[0, 28], [10, 44], [30, 38]]
    assert figure.headline == "The budget is never exceeded; at most 44\xa0% of it is left unused."


def test_what_is_above_the_budget_is_named():
    figure = budget_course(prepared(cases.tiny(ENTRIES, budget=60))[0])
    assert figure.data["over"] == [0, 30]
    assert figure.headline == "Over the budget at steps 0 and 30, by up to 12 parameters."
    table = decision_table(prepared(cases.tiny(ENTRIES, budget=60))[0])
    assert [cell.flag for row in table.rows for cell in row if cell.flag] == ["over budget"]


def test_a_told_excess_is_not_hidden_by_lower_ranks():
    record = cases.tiny(ENTRIES, [cases.decision(10, 101, 100, 12, 3)])
    assert budget_course(prepared(record)[0]).data["over"] == [10]


def test_a_budget_that_moves_is_unknown_before_the_first_decision():
    told = [cases.decision(10, 56, 90), cases.decision(30, 62, 70)]
    figure = budget_course(prepared(cases.tiny(ENTRIES, told, budget=70))[0])
    assert figure.data["budget"] == [[10, 90], [30, 70]]
    assert figure.data["slack"] == [[10, 34], [30, 8]]
    assert figure.data["used"][0] == [0, 72]


def test_bars_hold_what_is_told_else_what_ranks_give():
    told = [cases.decision(10, moved=13, changed=3), cases.decision(20)]
    figure = moved_bars(prepared(cases.tiny(ENTRIES, told))[0])
    assert figure.data["moved"] == [[10, 13], [20, 0], [30, 6]]
    assert figure.data["changed"] == [[10, 3], [20, 0], [30, 1]]
    assert "at step 10, moved 13\xa0% of the budget; the last one, at step 30, 6" in figure.headline


def test_many_targets_and_decisions_stay_light_and_true():
    record = cases.dynamic(layers=30, decisions=200, interval=10)
    run, layout = prepared(record)
    figure = rank_map(run, layout)
    assert len(figure.svg) < 400_000
    assert len(figure.data["targets"]) == 210
    assert "evenly chosen" in figure.caption
    by_step = dict(record.ranks_over_time)
    for name, cells in zip(figure.data["targets"], figure.data["cells"], strict=True):
        assert cells == [by_step[step][name] for step in figure.data["edges"][:-1]]
    assert figure.data["edges"][-2] == record.ranks_over_time[-1][0]
    energy = energy_map(run, layout)
    assert len(energy.svg) < 500_000
    assert len(moved_bars(run).data["moved"]) == 200


def test_rows_of_a_map_never_overlap_and_follow_types_and_layers():
    layout = gather(read_runs([cases.dynamic(layers=12, decisions=1)])).layout
    rows = lanes(list(reversed(list(layout.places))), layout)
    assert [row.group for row in rows[:13]] == ["q_proj"] * 12 + ["k_proj"]
    assert [row.layer for row in rows[:12]] == [str(i) for i in range(12)]
    assert all(a.bottom <= b.top + 1e-9 for a, b in pairwise(rows))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 500), st.integers(2, 90))
def test_chosen_positions_keep_both_ends(amount, most):
    chosen = evenly(amount, most)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, amount - 1)
    assert len(chosen) == min(amount, most)


def test_figures_are_written_as_files(tmp_path):
    record = cases.tiny(ENTRIES, [cases.decision(10, 56, 100, 12, 3, **MAPS)])
    write([record], tmp_path / "r.html", figures_dir=tmp_path / "f", formats=("svg", "png"))
    names = {file.name for file in (tmp_path / "f").iterdir()}
    assert {"ranks-over-time.svg", "energy-over-time.png", "moved-capacity.png"} <= names
    assert (tmp_path / "f" / "ranks-over-time.png").read_bytes().startswith(b"\x89PNG")
