"""Parts of a task: accuracy per part of a mixture, accuracy beside F1, on the page and as CSV."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from gradrank.report.comparison import build_comparison, write_comparison
from gradrank.report.comparison.breakdown import COLUMNS, MAX_PARTS, parts_csv, parts_table
from gradrank.report.comparison.view import read_comparison
from report import comparison_cases as cases
from report.strict_page import Page


def answers(right):
    """Return items of a mixture: how many of ten are right, by part and seed."""
    parts = {name: ["yes"] * count + ["no"] * (9 - count) + [""] for name, count in right.items()}
    return {
        "kind": "answers",
        "expected": ["yes"] * 10 * len(parts),
        "predicted": [text for texts in parts.values() for text in texts],
        "group": [name for name in parts for _ in range(10)],
    }


def classes(expected, predicted):
    return {"kind": "classes", "expected": expected, "predicted": predicted}


def runs(method, items, task="sst2"):
    rng = np.random.default_rng(0)
    return [
        cases.outcome(rng, task, "0.3%", method, seed, 0.5, items=each)
        for seed, each in enumerate(items)
    ]


MIXED = cases.small(
    runs("gard", [answers({"boolq": 4, "piqa": 9}), answers({"boolq": 2, "piqa": 9})]),
    runs("uniform", [answers({"boolq": 5, "piqa": 0}), answers({"boolq": 5, "piqa": 0})]),
)
# True positives 2, false positives 1, false negatives 1: F1 2/3, accuracy 3/5.
PAIRS = classes([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])


def of_pairs():
    ours, base = (
        cases.cell(runs(m, [PAIRS, PAIRS], "mrpc"), "mrpc", method=m) for m in ("gard", "uniform")
    )
    tasks = {"mrpc": cases.TASKS["mrpc"]}
    return cases.empty(tasks=tasks, methods=("uniform", "gard"), cells=(base, ours))


def rows_of(comparison):
    return list(csv.DictReader(io.StringIO(parts_csv(read_comparison(comparison)))))


def test_accuracy_per_part_is_the_mean_over_seeds():
    grid = parts_table(read_comparison(MIXED), "sst2", 1)
    assert [c.text for c in grid.head[2:]] == ["boolq (10 items)", "piqa (10 items)"]
    shown = {line.cells[0].text: line.cells[2:] for line in grid.lines}
    assert list(shown) == ["uniform", "gard"]
    assert [c.sort for c in shown["gard"]] == [pytest.approx(0.3), pytest.approx(0.9)]
    assert [c.sort for c in shown["uniform"]] == [0.5, 0.0]
    assert shown["gard"][0].small == "sd 0.1414"


def test_accuracy_and_f1_stand_beside_their_mean():
    grid = parts_table(read_comparison(of_pairs()), "mrpc", 1)
    assert [c.text for c in grid.head[2:]] == ["accuracy (5 items)", "f1 (5 items)"]
    for line in grid.lines:
        assert [c.sort for c in line.cells[2:]] == [pytest.approx(0.6), pytest.approx(2 / 3)]


def test_the_csv_has_one_row_per_part():
    rows = rows_of(MIXED)
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 4
    found = {(r["method"], r["part"]): (float(r["mean"]), r["seeds"], r["items"]) for r in rows}
    assert found["gard", "boolq"] == (pytest.approx(0.3), "2", "10")
    assert {r["metric"] for r in rows} == {"accuracy"}
    named = {(r["part"], r["metric"]) for r in rows_of(of_pairs())}
    assert named == {("", "accuracy"), ("", "f1")}


def test_tasks_without_parts_have_no_table():
    one = cases.small(runs("gard", [answers({"boolq": 4})] * 2), runs("uniform", [PAIRS] * 2))
    view = read_comparison(one)
    assert parts_table(view, "sst2", 1) is None
    assert parts_csv(view) == ""
    assert "Part by part" not in build_comparison(one)


def test_items_that_are_not_whole_are_passed_over():
    bad = {**answers({"boolq": 4, "piqa": 9}), "expected": ["yes"]}
    good = answers({"boolq": 4, "piqa": 9})
    rows = rows_of(cases.small(runs("gard", [bad, good]), runs("uniform", [bad, bad])))
    assert [(r["method"], r["seeds"]) for r in rows] == [("gard", "1")] * 2


def test_the_page_folds_parts_and_escapes_their_names():
    evil = "<script>alert('x')</script>"
    items = [answers({evil: 4, "=1+1": 9})] * 2
    comparison = cases.small(runs("gard", items), runs("uniform", items))
    html = build_comparison(comparison)
    assert html.count("<script") == 1
    assert "Part by part" in Page(html).text
    assert evil in Page(html).text
    assert {r["part"] for r in rows_of(comparison)} == {evil, "'=1+1"}


def test_many_parts_are_cut_on_the_page_only():
    items = [answers({f"p{i}": 4 for i in range(MAX_PARTS + 3)})] * 2
    comparison = cases.small(runs("gard", items), runs("uniform", items))
    grid = parts_table(read_comparison(comparison), "sst2", 1)
    assert len(grid.head) == 2 + MAX_PARTS
    assert f"The first {MAX_PARTS} of {MAX_PARTS + 3} parts" in grid.caption
    assert len(rows_of(comparison)) == 2 * (MAX_PARTS + 3)


def test_the_file_of_parts_stands_beside_the_table(tmp_path):
    written = write_comparison(MIXED, tmp_path / "a.html", csv=tmp_path / "table.csv")
    assert [path.name for path in written] == ["a.html", "table.csv", "table-parts.csv"]
    plain = replace(MIXED, cells=())
    (tmp_path / "b").mkdir()
    written = write_comparison(plain, tmp_path / "b" / "a.html", csv=tmp_path / "b" / "table.csv")
    assert [path.name for path in written] == ["a.html", "table.csv"]
