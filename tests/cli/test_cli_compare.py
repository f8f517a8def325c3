"""``gradrank compare`` as a user has it: killed grids go on, mistakes are named."""

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from filelock import FileLock

from gradrank.cli.main import main
from gradrank.lab.compare.bench import Bench
from gradrank.lab.compare.carry import carry_out
from gradrank.lab.compare.run import open_grid
from launching import COMMAND, Started, start

RECIPE: dict[str, Any] = {
    "schema": "gradrank.recipe/1",
    "name": "small",
    "about": "a <b>question</b>",
    "source": "the tests",
    "run": {
        "model": "tiny-llama",
        "task": "tiny-lm",
        "steps": 3,
        "batch_size": 4,
        "batches": 3,
        "max_length": 16,
        "validation": 30,
        "eval_examples": 40,
    },
    "learning_rates": [1e-3, 1e-2],
    "calibration_seeds": [8, 9],
    "budgets": ["uniform:1"],
    "seeds": [0, 1],
    "methods": ["uniform", "waterfill"],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}), encoding="utf-8")
    return path


def invoke(*args: str) -> Any:
    return CliRunner().invoke(main, ["compare", *args])


def started(recipe: Path, out: Path) -> Started:
    return start(COMMAND, "compare", str(recipe), "--out", str(out), "--json", session=True)


def until(true: Callable[[], bool], process: Started) -> None:
    deadline = time.monotonic() + 150
    while not true():
        assert process.code is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)


def records(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "runs").glob("*.json"))}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_grid_goes_on_and_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    recipe, out = written(tmp_path), tmp_path / "grid"
    process = started(recipe, out)
    until(lambda: len(records(out)) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    before = records(out)
    assert 2 <= len(before) < 4 + 4 + 2
    assert all(json.loads(text)["status"] == "finished" for text in before.values())

    result = invoke(str(recipe), "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["finished"] == told["planned"] == 4 + 4 + 2
    assert told["failed"] == []
    after = records(out)
    assert {name: after[name] for name in before} == before

    # The same runs, carried out here one by one and never disturbed.
    grid = open_grid(out / "recipe.yaml", out)
    bench = Bench(tmp_path / "cache")
    for run in (grid.tuning()[0], grid.final()[-1], grid.stability()[0]):
        one, other = (
            carry_out(run, grid.recipe, bench).to_dict(),
            json.loads(after[f"{run.id}.json"]),
        )
        for key in ("metrics", "losses", "items", "ranks_over_time", "trainable_parameters"):
            assert one[key] == other[key], (run.id, key)

    with (out / "table.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["method"] for row in rows} == {"uniform", "waterfill"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "a <b>question</b>" not in page
    assert "no evidence" in page.lower()

    # A damaged record is named and never averaged, and nothing is run. With one pair of seeds left
    # there is nothing to test, by any metric or reference.
    final = next(name for name in after if name.startswith("final") and "waterfill" in name)
    (out / "runs" / final).write_text(after[final].decode()[:200], encoding="utf-8")
    other = ("--metric", "perplexity", "--reference", "waterfill")
    again = invoke(str(recipe), "--out", str(out), "--report-only", "--json", *other)
    assert again.exit_code == 0, again.stderr
    assert final in again.stderr
    told = json.loads(again.stdout)
    assert told["finished"] == 9
    assert (out / "runs" / final).read_text(encoding="utf-8") == after[final].decode()[:200]
    (contrast,) = told["contrasts"]
    assert contrast["method"] == "uniform"
    assert contrast["verdict"] == "not tested"


@pytest.mark.slow
def test_ctrl_c_finishes_the_run_in_hand_and_the_grid_goes_on(tmp_path: Path) -> None:
    recipe = written(tmp_path, learning_rates=[], calibration_seeds=[])
    out = tmp_path / "grid"
    process = started(recipe, out)
    until(lambda: len(records(out)) >= 1, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, process.stderr
    stderr = process.stderr
    assert "goes on" in stderr
    assert "Traceback" not in stderr
    assert "no record" not in stderr
    stopped = records(out)
    assert 1 <= len(stopped) < 4
    assert all(json.loads(text)["status"] == "finished" for text in stopped.values())
    result = invoke(str(recipe), "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["finished"] == 4


@pytest.mark.slow
def test_a_failed_run_is_kept_shown_and_tried_again_when_asked(tmp_path: Path) -> None:
    changes = {"learning_rates": [], "calibration_seeds": [], "seeds": [0]}
    recipe = written(tmp_path, methods=["uniform", "bitfit"], **changes)
    out = tmp_path / "grid"
    result = invoke(str(recipe), "--out", str(out), "--json")
    assert result.exit_code == 1, result.stderr
    assert "failed runs: 1" in result.stderr
    again = invoke(str(recipe), "--out", str(out), "--json")
    assert again.exit_code == 0, again.stderr  # nothing was to do, and nothing failed
    (failed,) = json.loads(result.stdout)["failed"]
    assert "bitfit" in failed
    assert "bitfit" in (out / "report.html").read_text(encoding="utf-8")
    grid = open_grid(recipe, out)
    assert grid.missing(grid.all_runs()) == []
    grid.retry = True
    assert [run.label for run in grid.missing(grid.all_runs())] == ["bitfit"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": ["uniform:1"]}, ("unknown key 'budget'", "'budgets'")),
        ({"methods": ["uniform", "dorra"]}, ("'dorra'", "'dora'")),
        ({"run": {**RECIPE["run"], "stepz": 3}}, ("'stepz'", "'steps'")),
        ({"tuning_seeds": [1]}, ("seed 1",)),
        ({"learning_rates": [0]}, ("positive",)),
        ({"budgets": ["8x"]}, ("8x",)),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    result = invoke(str(written(tmp_path, **changes)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    recipe, out = written(tmp_path), tmp_path / "out"
    assert "does not exist" in invoke(str(tmp_path / "no.yaml"), "--out", str(out)).stderr
    assert "--out DIR" in invoke(str(recipe)).stderr
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "no grid" in invoke(str(recipe), "--out", str(full)).stderr
    nothing = invoke(str(recipe), "--out", str(out), "--report-only")
    assert nothing.exit_code == 2
    assert "no finished run" in nothing.stderr
    other = written(tmp_path, name="another")
    assert "grid of 'small'" in invoke(str(other), "--out", str(out)).stderr
    wrong = invoke(
        str(out / "recipe.yaml"), "--out", str(out), "--report-only", "--metric", "acuracy"
    )
    assert "'accuracy'" in wrong.stderr
    with FileLock(str(out / ".lock")):
        twice = invoke(str(out / "recipe.yaml"), "--out", str(out))
    assert twice.exit_code == 2
    assert "another process" in twice.stderr


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path) -> None:
    run = {**RECIPE["run"], "task": "sst2", "model": "tiny-bert"}
    recipe = written(
        tmp_path, run=run, learning_rates=[], calibration_seeds=[], seeds=[0], methods=["uniform"]
    )
    result = invoke(str(recipe), "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path))
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert "--data-dir" in result.stderr
    assert "sst2" in result.stderr


def test_a_missing_model_is_one_error_and_not_one_per_run(tmp_path: Path) -> None:
    run = {**RECIPE["run"], "model": str(tmp_path / "nowhere")}
    result = invoke(str(written(tmp_path, run=run)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr.count("does not exist") == 1
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_model_that_cannot_be_unpacked_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gradrank.lab.download.importlib.util.find_spec", lambda _name: None)
    run = {**RECIPE["run"], "model": "dinov2-small-focus"}
    result = invoke(str(written(tmp_path, run=run)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "needs the package 'onnx'" in result.stderr
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_dry_run_prints_the_grid_and_runs_nothing(tmp_path: Path) -> None:
    result = invoke(str(written(tmp_path)), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "10 runs" in result.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "small.yaml"]
