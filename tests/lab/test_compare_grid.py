"""Grids: settings, names of runs, choice of rates, and what a folder of records is worth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gradrank.core.errors import DataError, GradrankError
from gradrank.lab.compare.config import RunConfig, run_config
from gradrank.lab.compare.grid import GridRun, final_runs, stability_runs, tuning_runs
from gradrank.lab.compare.recipe import Recipe
from gradrank.lab.compare.run import NO_RATE, open_grid
from gradrank.lab.compare.store import Found, Store
from gradrank.lab.compare.tuning import chosen_rates
from gradrank.lab.recipes import read
from gradrank.record import RunRecord

WHOLE = {
    "schema": "gradrank.recipe/1",
    "name": "one",
    "about": "a question",
    "source": "a paper",
    "run": {"model": "tiny-llama", "task": "tiny-lm", "steps": 4, "validation": 20},
    "budgets": ["uniform:1", 5000],
    "seeds": [0, 3],
    "learning_rates": ["1e-3", 0.01],
    "calibration_seeds": [50, 51],
    "methods": ["uniform", "gard", {"label": "a/b", "method": "igu", "run": {"steps": 8}}, "dora"],
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    data = {key: value for key, value in {**WHOLE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return read(written(tmp_path))


def recorded(run: GridRun, value: float | None, status: str = "finished") -> RunRecord:
    record = RunRecord(name=run.label, kind="train", status=status)
    record.metrics = {} if value is None else {"eval_loss": value}
    record.comparison = {"run": run.id, "metric": "eval_loss", "phase": run.phase}
    return record


def test_every_cell_has_a_run_per_seed_and_seeds_are_outermost(recipe: Recipe) -> None:
    runs = final_runs(recipe, {})
    assert len(runs) == 4 * 2 * 2
    assert [run.seed for run in runs] == [0] * 8 + [3] * 8
    cells = [(run.label, run.budget) for run in runs]
    assert cells[:8] == cells[8:]
    assert len({run.id for run in runs}) == len(runs)


def test_rates_are_searched_with_other_seeds_and_equal_trials(recipe: Recipe) -> None:
    runs = tuning_runs(recipe)
    assert {run.seed for run in runs}.isdisjoint(recipe.seeds)
    per_arm = {label: sum(run.label == label for run in runs) for label in ("uniform", "a/b")}
    assert per_arm == {"uniform": 4, "a/b": 4}
    assert {run.config.lr for run in runs} == {1e-3, 1e-2}


def test_an_arm_of_which_no_rate_worked_fails_and_is_not_run_untuned(tmp_path: Path) -> None:
    grid = open_grid(written(tmp_path), tmp_path / "out")
    for run in grid.tuning():
        bad = run.label == "dora"
        grid.store.save(run, recorded(run, *((None, "failed") if bad else (1.0, "finished"))))
    to_do = grid._tuned(grid.final())
    assert {run.label for run in to_do} == {"uniform", "gard", "a/b"}
    lost = [run for run in grid.final() if run.label == "dora"]
    records = [grid.store.read([run]).records[run.id] for run in lost]
    assert [record.status for record in records] == ["failed"] * len(lost)
    assert all(NO_RATE in (record.comparison or {})["message"] for record in records)
    assert grid.failures == [run.id for run in lost]


def test_only_methods_that_measure_are_calibrated_again(recipe: Recipe) -> None:
    runs = stability_runs(recipe)
    assert {run.label for run in runs} == {"gard"}
    assert len(runs) == 2 * 2


def test_a_run_of_other_settings_has_another_name(recipe: Recipe) -> None:
    run = final_runs(recipe, {})[0]
    others = [
        replace(run, config=replace(run.config, steps=5)),
        replace(run, config=replace(run.config, lr=0.5)),
        replace(run, options={"energy": "0.5"}),
        replace(run, seed=1),
    ]
    assert len({run.id, *(other.id for other in others)}) == 5
    assert GridRun.from_dict(json.loads(json.dumps(run.to_dict()))).id == run.id


def test_a_methods_own_settings_reach_its_runs_only(recipe: Recipe) -> None:
    steps = {run.label: run.config.steps for run in final_runs(recipe, {})}
    assert steps == {"uniform": 4, "gard": 4, "a/b": 8, "dora": 4}


def test_the_best_validated_rate_wins_and_a_diverging_one_never(recipe: Recipe) -> None:
    runs = tuning_runs(recipe)
    found = Found()
    for run in runs:
        if run.label == "gard":
            status = "failed" if run.config.lr == 1e-2 else "finished"
            found.records[run.id] = recorded(run, 9.0 if status == "finished" else None, status)
        else:
            # less is better for a loss
            found.records[run.id] = recorded(run, 2.0 if run.config.lr == 1e-3 else 1.0)
    chosen = chosen_rates(runs, found)
    assert chosen["tiny-lm", "uniform", "uniform:1"] == 1e-2
    assert chosen["tiny-lm", "gard", "5000"] == 1e-3


def test_a_cell_without_any_finished_rate_has_none(recipe: Recipe) -> None:
    runs = [run for run in tuning_runs(recipe) if run.label == "uniform"]
    found = Found({run.id: recorded(run, None, "failed") for run in runs})
    assert chosen_rates(runs, found) == {}


def test_a_rate_needs_all_its_seeds(tmp_path: Path) -> None:
    recipe = read(written(tmp_path, tuning_seeds=[7, 8], methods=["uniform"], budgets=[5000]))
    runs = tuning_runs(recipe)
    found = Found()
    for run in runs:
        # the larger rate is better for one seed and diverges for the other
        bad = run.config.lr == 1e-2 and run.seed == 8
        value = 1.0 if run.config.lr == 1e-2 else 2.0
        found.records[run.id] = recorded(run, value, "failed" if bad else "finished")
    assert chosen_rates(runs, found) == {("tiny-lm", "uniform", "5000"): 1e-3}


def test_a_corrupt_record_is_named_and_counts_for_nothing(recipe: Recipe, tmp_path: Path) -> None:
    store, runs = Store(tmp_path / "grid"), final_runs(recipe, {})[:4]
    for run in runs:
        store.save(run, recorded(run, 1.0))
    store.path(runs[0]).write_text('{"schema": "gradrank.record/1", "na', encoding="utf-8")
    store.path(runs[1]).write_text(store.path(runs[2]).read_text(), encoding="utf-8")
    (store.runs / "final--old--settings.json").write_text("{}", encoding="utf-8")
    found = store.read(runs)
    assert set(found.records) == {runs[2].id, runs[3].id}
    names = [name for name, _ in found.excluded]
    assert store.path(runs[0]).name in names
    assert store.path(runs[1]).name in names
    assert found.finished(runs[0]) is None
    assert found.finished(runs[3]) is not None
    assert any("other settings" in reason for _, reason in found.excluded)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": [1e-3]}, "'learning_rates'"),
        ({"run": {"model": "tiny-llama", "task": "tiny-lm", "stepz": 3}}, "'steps'"),
        ({"run": {"model": "tiny-llama", "task": "tiny-lm", "seed": 3}}, "axis of the grid"),
        ({"run": {"model": "tiny-llama", "task": "tiny-lm"}}, "'validation'"),
        ({"run": {"task": "tiny-lm", "validation": 5}}, "'model' is missing"),
        ({"run": {"model": "tiny-llama", "validation": 5}}, "neither was given"),
        ({"tuning_seeds": [3]}, "seed 3 both"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"seeds": ["a"]}, "different whole numbers"),
        ({"learning_rates": [0.1, -1]}, "positive numbers"),
        ({"methods": ["uniform", "dorra"]}, "'dora'"),
        ({"methods": ["uniform", {"method": "gard", "option": {"enrgy": 1}}]}, "'energy'"),
        ({"methods": ["uniform", {"method": "gard", "lable": "x"}]}, "'label'"),
        ({"methods": ["uniform", "uniform"]}, "two methods"),
        ({"methods": ["gard"]}, "reference 'uniform'"),
        ({"methods": ["uniform", {"method": "gard", "learning_rates": [0.1]}]}, "equal|as many"),
        (
            {"methods": ["uniform", {"method": "gard", "budgets": [7]}]},
            "none of those that run",
        ),
        ({"budgets": ["uniform:x"]}, "uniform:x"),
        ({"tasks": ["tiny-lm", "tiny-lm"]}, "two tasks"),
    ],
)
def test_wrong_recipes_are_refused_in_words(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(GradrankError, match=words):
        read(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 1.5}, "'steps' is 1.5; it takes int"),
        ({"steps": True}, "it takes int"),
        ({"lr": "fast"}, "it takes float"),
        ({"lr": 0}, "positive"),
        ({"steps": 4, "epochs": 1}, "given twice"),
        ({"task": "tiny-lm", "data": "x.csv"}, "both were given"),
        ({"scaling": 0}, "'scaling' is 0"),
        ({"train_examples": 0}, "at least 1"),
        ({"preset": "nothing"}, "unknown"),
    ],
)
def test_wrong_settings_are_refused_in_words(values: dict[str, object], words: str) -> None:
    with pytest.raises(GradrankError, match=words):
        run_config({"model": "m", "task": "tiny-lm", **values}, "here")


def test_a_preset_stands_below_what_is_given() -> None:
    config = run_config({"preset": "pilora-commonsense-llama2-7b", "task": "boolq"}, "here")
    assert config.epochs == 3
    assert config.lr == 2e-4
    assert config.batch_size == 16
    shorter = run_config(
        {"preset": "pilora-commonsense-llama2-7b", "task": "boolq", "steps": 5, "lr": "1e-3"},
        "here",
    )
    assert shorter.epochs is None
    assert shorter.steps == 5
    assert shorter.lr == 1e-3


def test_epochs_are_steps_of_the_data() -> None:
    config = RunConfig(model="m", task="t", epochs=2.0, batch_size=4, accumulate=2)
    assert config.settings(0, 80).steps == 20


def test_a_missing_recipe_is_data_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n", encoding="utf-8")
    with pytest.raises(DataError, match="no mapping"):
        read(tmp_path / "list.yaml")
