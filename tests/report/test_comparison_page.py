import base64
import csv
import hashlib
import io
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from gradrank.core.errors import OptionError, OutputError
from gradrank.evidence.comparison import BudgetInfo, Excluded, Failure, TaskInfo
from gradrank.report.comparison import build_comparison, write_comparison
from gradrank.report.comparison.export import COLUMNS, to_csv
from gradrank.report.comparison.view import read_comparison
from report import comparison_cases as cases
from report.strict_page import Page

EVIL = "<script>alert('x')</script>\"'&"


@pytest.fixture(scope="module")
def demo():
    return build_comparison(cases.realistic(), finished=760, planned=771)


def runs(*values, method="gard", **changes):
    return [
        cases.outcome(cases.np.random.default_rng(i), "sst2", "0.3%", method, i, v, **changes)
        for i, v in enumerate(values)
    ]


def table_rows(html, name="all"):
    """Return the cells of a table: (attributes, text) in rows."""
    body = re.search(rf'<table class="sortable" id="{name}">.*?</table>', html, re.DOTALL)[0]
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", body.split("<tbody>")[1], re.DOTALL)
    return [re.findall(r"<t[dh]([^>]*)>(.*?)</t[dh]>", line, re.DOTALL) for line in lines]


def test_the_same_comparison_gives_the_same_bytes(demo):
    assert build_comparison(cases.realistic(), finished=760, planned=771) == demo


def test_every_section_is_there_in_reading_order(demo):
    page = Page(demo)
    assert page.sections == [
        "found",
        "table",
        "tasks",
        "pooled",
        "pareto",
        "rates",
        "ranks",
        "stability",
        "cost",
        "records",
        "replay",
    ]
    assert [a["href"] for t, a in page.tags if t == "a"] == [f"#{n}" for n in page.sections]


def test_headings_descend_one_level_at_a_time(demo):
    headings = Page(demo).headings
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))


def test_every_figure_has_heading_caption_and_text_alternative(demo):
    page = Page(demo)
    drawn = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawn) == 3 * 5 + 9 + 3
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(drawn)


def test_ids_are_unique_over_the_whole_page(demo):
    ids = [attrs["id"] for _, attrs in Page(demo).tags if "id" in attrs]
    assert len(set(ids)) == len(ids)


def test_nothing_outside_is_referred_to(demo):
    page = Page(demo)
    assert not [t for t, _ in page.tags if t in {"link", "img", "iframe", "image", "object"}]
    for _, attrs in page.tags:
        for key in ("src", "href", "xlink:href", "action", "poster"):
            assert attrs.get(key, "#").startswith("#")
    assert set(re.findall(r"https?://[^\s\"'<]+", demo)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in demo
    assert re.findall(r"url\((?!#)", demo) == []


def test_the_policy_forbids_everything_but_this_script(demo):
    page = Page(demo)
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [a for _, a in page.tags for key in a if key.startswith("on")]


def test_the_main_table_has_a_row_per_cell_and_numeric_sort_keys(demo):
    rows = table_rows(demo)
    cells = cases.realistic().cells
    assert len(rows) == len(cells) == 126
    numeric = [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]
    for cell, row in zip(cells, rows, strict=True):
        keys = [re.search(r'data-sort="([^"]*)"', attrs) for attrs, _ in row]
        assert all(keys[i] is None or float(keys[i][1]) is not None for i in numeric)
        mean = keys[3] and float(keys[3][1])
        assert mean == cell.mean
        assert keys[0][1] == cell.method


def test_sort_keys_of_budgets_follow_their_size_not_their_text(demo):
    keys = {
        row[2][1]: float(re.search(r'data-sort="([^"]*)"', row[2][0])[1])
        for row in table_rows(demo)
    }
    assert sorted(keys, key=keys.__getitem__) == ["2570", "0.3%", "uniform:8"]


def test_filters_name_every_task_budget_and_method(demo):
    form = re.search(r'<form class="filters".*?</form>', demo, re.DOTALL)[0]
    options = re.findall(r'data-filter="(\d+)"> (.*?)</label>', form)
    wanted = [*cases.TASKS, *cases.BUDGETS, *cases.METHODS]
    assert [text for _, text in options] == wanted
    keys = re.findall(r'<tr data-keys="(\d+) (\d+) (\d+)">', demo)
    first = {tuple(map(int, key)) for key in keys}
    assert first == {(t, b, m) for t in range(3) for b in range(3) for m in range(14)}


def test_without_scripts_all_rows_show_and_the_filters_do_not(demo):
    assert '<form class="filters" data-table="all" hidden>' in demo
    body = re.search(r'<table class="sortable" id="all">.*?</table>', demo, re.DOTALL)[0]
    assert "hidden" not in body.replace('<caption class="hidden">', "")


def test_verdicts_have_a_mark_and_not_colour_alone(demo):
    marks = {"better": "▲", "worse": "▼", "no evidence": "○", "not tested": "–", "reference": "◆"}
    shown = {row[8][1] for row in table_rows(demo)}
    assert shown == {f"{mark} {verdict}" for verdict, mark in marks.items()}


def test_failed_missing_and_excluded_are_named(demo):
    text = Page(demo).text
    assert "760 runs finished of 771 planned" in text
    assert "The grid is not complete" in text
    assert "⚠ 3 of 5 1 failed, 1 missing" in text
    assert "mrpc-pilora-2570-seed4" in text
    assert "Diverged at step 41." in text
    assert "not valid JSON: line 3 ends early" in text


def test_a_complete_grid_is_not_called_incomplete():
    page = build_comparison(cases.small(runs(0.8, 0.9)), finished=4, planned=4)
    assert "not complete" not in page


def test_hostile_texts_are_escaped_everywhere():
    outcomes = runs(0.81, 0.82, 0.83, method=EVIL)
    outcomes = [replace(o, task=EVIL, budget=EVIL, run_id=EVIL, notes=(EVIL,)) for o in outcomes]
    base = [replace(o, method="uniform", value=o.value - 0.01) for o in outcomes]
    where = {"task": EVIL, "budget": EVIL}
    cells = cases.cell(base, method="uniform", **where), cases.cell(outcomes, method=EVIL, **where)
    comparison = cases.empty(
        name=EVIL,
        about=EVIL,
        source=EVIL,
        tasks={EVIL: TaskInfo(EVIL, True, EVIL)},
        budgets=(BudgetInfo(EVIL, {EVIL: 10}),),
        methods=("uniform", EVIL),
        cells=cells,
        contrasts=(cases.contrast(cells[1], cells[0]),),
        tuned=cases.tuned({EVIL: TaskInfo(EVIL, True, EVIL)}, [EVIL], [EVIL]),
        stability=cases.stability([EVIL], [EVIL], [EVIL]),
        failures=(Failure(EVIL, EVIL),),
        excluded=(Excluded(EVIL, EVIL),),
    )
    html = build_comparison(comparison)
    page = Page(html)
    assert html.count("<script") == 1
    assert len(page.scripts) == 1
    assert "alert('x')" not in page.scripts[0]
    assert EVIL in page.text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert all(re.fullmatch(r"[a-z0-9-]+", each) for each in ids)


def test_control_characters_do_not_reach_the_page():
    comparison = cases.small(runs(0.8, 0.9), about="a\x00b\u202ec")
    html = build_comparison(comparison)
    assert "\x00" not in html
    assert "\u202e" not in html


def test_an_empty_comparison_says_so():
    page = Page(build_comparison(cases.empty(), finished=0, planned=12))
    assert page.sections == ["found", "replay"]
    assert "nothing to compare" in page.text


def test_one_seed_is_no_evidence_of_anything():
    html = build_comparison(cases.small(runs(0.9), runs(0.8, method="uniform")))
    text = Page(html).text
    assert "No method could be tested against uniform" in text
    assert "1 seed here" in text
    assert "better:" not in text
    assert {row[8][1] for row in table_rows(html)} == {"◆ reference", "– not tested"}


def test_a_cell_of_failures_only_has_no_mean():
    html = build_comparison(cases.small([], runs(0.8, 0.81, method="uniform"), failed=3))
    row = next(row for row in table_rows(html) if row[0][1].startswith("gard"))
    assert "data-sort" not in row[3][0]
    assert row[3][1] == "–"
    assert row[5][1] == "⚠ 0 of 3<small>3 failed</small>"


def test_an_effect_is_reported_and_its_absence_is_not_turned_into_one():
    base = runs(0.800, 0.805, 0.803, method="uniform")
    for shift, wanted in ((0.05, "better: gard"), (-0.05, "worse: gard")):
        found = [replace(o, method="gard", value=o.value + shift) for o in base]
        found[0] = replace(found[0], value=found[0].value + 0.001)
        assert wanted in Page(build_comparison(cases.small(found, base))).text
    noise = runs(0.802, 0.801, 0.806)
    text = Page(build_comparison(cases.small(noise, base))).text
    assert "none is evidence" in text or "it is no evidence" in text
    assert "no evidence of a difference for 1 of 1 tested arm" in text
    assert "not evidence that there is none" in text


def test_the_csv_round_trips():
    comparison = cases.realistic()
    rows = list(csv.DictReader(io.StringIO(to_csv(read_comparison(comparison)))))
    assert tuple(rows[0]) == COLUMNS
    contrasts = {(c.task, c.budget, c.method): c for c in comparison.contrasts}
    for cell, row in zip(comparison.cells, rows, strict=True):
        assert (row["task"], row["budget"], row["method"]) == (cell.task, cell.budget, cell.method)
        assert row["mean"] == "" if cell.mean is None else float(row["mean"]) == cell.mean
        assert row["seeds"].split() == [str(o.seed) for o in cell.outcomes]
        assert int(row["failed"]) == cell.failed
        assert row["runs"].split() == [o.run_id for o in cell.outcomes]
        found = contrasts.get((cell.task, cell.budget, cell.method))
        if found is None:
            assert row["verdict"] == "reference"
            continue
        assert row["verdict"] == found.verdict
        known = found.difference is not None
        assert row["difference"] == (repr(found.difference) if known else "")
        assert row["p_corrected"] == "" if found.p is None else float(row["p"]) == found.p


def test_the_csv_starts_no_formula_and_keeps_one_line_per_cell():
    outcomes = [replace(o, method="=1+1\n") for o in runs(0.8, 0.9)]
    ours = cases.cell(outcomes, method="=1+1\n")
    comparison = cases.empty(
        tasks={"sst2": cases.TASKS["sst2"]}, methods=("=1+1\n",), cells=(ours,)
    )
    (row,) = csv.DictReader(io.StringIO(to_csv(read_comparison(comparison))))
    assert row["method"] == "'=1+1\ufffd"


def test_files_are_written_and_nothing_is_replaced_unasked(tmp_path):
    comparison = cases.small(runs(0.81, 0.82), runs(0.8, 0.81, method="uniform"))
    page, table, folder = tmp_path / "a.html", tmp_path / "a.csv", tmp_path / "figures"
    written = write_comparison(comparison, page, figures_dir=folder, csv=table, finished=4)
    assert written[:2] == [page, table]
    names = {path.name for path in folder.iterdir()}
    assert {"contrast-1-sst2.png", "contrast-1-sst2.svg", "pareto-1-sst2.svg"} <= names
    assert {path.name for path in written[2:]} == names
    assert (folder / "contrast-1-sst2.png").read_bytes().startswith(b"\x89PNG")
    before = page.read_bytes()
    table.unlink()
    with pytest.raises(OutputError, match="exists already"):
        write_comparison(comparison, page, csv=table)
    assert not table.exists()
    write_comparison(comparison, page, overwrite=True, csv=table, finished=4)
    assert page.read_bytes() == before


def test_an_unknown_figure_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OptionError, match="gif"):
        write_comparison(cases.empty(), tmp_path / "a.html", formats=("gif",))
    assert not list(tmp_path.iterdir())
