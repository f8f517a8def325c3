"""Goals, tables, files and the page of benchmarks, on results that are made up."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.frame import SCHEMA, Bench, Found, Goal, main, parse, reached, sentence, table

from benchmarks import bench_start, page
from gradrank.core.errors import DataError

GOALS = (
    Goal("a step", "mine", "ratio", 1.02, "plain"),
    Goal("a start", "start", "seconds", 0.3, interval=""),
    Goal("not run", "absent", "ratio", 1.0, "plain"),
)
ROWS: dict[str, Any] = {
    "plain": {"seconds": 2.0, "ratio": 1.0, "interval": [1.0, 1.0]},
    "mine": {"seconds": 2.1, "ratio": 1.03, "interval": [1.01, 1.05], "peak_bytes": 3 << 20},
    "start": {"seconds": 0.2, "interval": [5.0, 6.0], "stored_bytes": 512},
}


def bench(**changes: Any) -> Bench:
    run = lambda _args: Found(ROWS, {"peer": "Not installed."}, ["A note."])  # noqa: E731
    return Bench(
        **{"name": "start", "about": "It.", "minutes": 1, "run": run, "goals": GOALS} | changes
    )


def result(**changes: Any) -> dict[str, Any]:
    made = {
        "schema": SCHEMA,
        "name": "start",
        "quick": False,
        "settings": {"model": "m", "batch": 8, "length": 48, "threads": 0, "repeats": 3},
        "environment": {"device": "cpu", "threads": 2},
        "minutes": 1.5,
        "others_share": 0.3,
        "rows": ROWS,
        "goals": reached(GOALS, ROWS),
        "skipped": {"peer": "Not installed."},
        "notes": [],
    }
    return made | changes


def test_goals_are_met_missed_or_within_the_noise() -> None:
    step, start = reached(GOALS, ROWS)
    assert (step["met"], step["sure"]) == (False, False)
    assert (start["met"], start["sure"]) == (True, None)
    assert page.verdict(step) == "missed, within the noise"
    assert sentence(start) == "a start: 0.200, wanted at most 0.3 s: met"
    below = {"mine": ROWS["mine"] | {"ratio": 1.0, "interval": [0.99, 1.01]}}
    assert [(g["met"], g["sure"]) for g in reached(GOALS, below)] == [(True, True)]


def test_tables_line_up_and_leave_out_empty_columns() -> None:
    lines = table(ROWS, ("seconds", "interval", "nothing", "peak_bytes")).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["seconds", "interval", "peak", "bytes"]
    assert lines[2].split() == ["mine", "2.100", "1.010..1.050", "3,145,728"]


def test_quick_takes_a_tiny_model_and_flags_still_win() -> None:
    made = bench(
        flags=lambda p: p.add_argument("--steps", type=int, default=50), quick={"steps": 5}
    )
    quick = parse(made, ["--quick", "--batch", "3"])
    assert (quick.model, quick.batch, quick.steps) == ("tiny-llama", 3, 5)
    assert parse(made, []).steps == 50


def test_a_result_is_written_where_asked_and_not_from_a_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--quick"])
    monkeypatch.setattr("benchmarks.frame.RESULTS", tmp_path / "results")
    main(bench())
    assert not (tmp_path / "results").exists()
    assert "peer: left out. Not installed." in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bench"])
    main(bench())
    written = json.loads((tmp_path / "results" / "start.json").read_text())
    assert written["schema"] == SCHEMA
    assert written["rows"] == ROWS
    assert len(written["goals"]) == 2
    assert 0 <= written["others_share"] <= 1


def test_a_part_is_done_in_this_process_and_printed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = lambda args, name: {"name": name, "steps": args.steps}  # noqa: E731
    wanted = json.dumps({"part": "lora", "args": {"steps": 7}})
    monkeypatch.setattr("sys.argv", ["bench", "--part", wanted])
    main(bench(part=part))
    assert json.loads(capsys.readouterr().out) == {"name": "lora", "steps": 7}


def test_the_page_is_filled_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "start.json").write_text(json.dumps(result()))
    text = tmp_path / "page.md"
    text.write_text("# T\n<!-- goals -->\n<!-- /goals -->\n<!-- rows -->\n<!-- /rows -->\n")
    picture = tmp_path / "figure.svg"
    flags = ["--results", str(tmp_path), "--page", str(text), "--figure", str(picture)]
    monkeypatch.setattr("sys.argv", ["page", *flags])
    page.main()
    written = text.read_text()
    assert "| a step | ≤ 1.02 | **1.030** | 1.010 to 1.050 | missed, within the noise" in written
    assert "1 of 2 goals met](figures/figure.svg)" in written
    assert "3.0 MiB" in written
    assert "512 B" in written
    assert "Other programs used 30%" in written
    assert "`peer` was left out: Not installed." in written
    assert "a start" in picture.read_text()


def test_smokes_and_strangers_do_not_get_onto_the_page(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    for wrong in (result(quick=True), result(schema="gradrank.bench/1"), []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"start\.json"):
            page.read_results(tmp_path)
    path.unlink()
    assert page.read_results(tmp_path) == {}
    assert page.goals_figure({}) is None


def test_torch_is_seen_where_it_is_loaded() -> None:
    assert not bench_start.loads_torch("pass")
    assert bench_start.loads_torch("import types; sys.modules['torch'] = types.ModuleType('torch')")


def test_nothing_of_a_bench_is_missing_in_the_namespace_of_a_part() -> None:
    plain = vars(parse(bench(), ["--quick"]))
    assert {
        k for k, v in plain.items() if not isinstance(v, str | int | float | bool | None)
    } == set()
    assert isinstance(argparse.Namespace(**plain).model, str)
