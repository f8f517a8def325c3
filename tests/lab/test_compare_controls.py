"""Controls of a grid that draw at random: anew for every seed of a run, each its own draw."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gradrank.lab.compare.bench import Bench
from gradrank.lab.compare.carry import carry_out
from gradrank.lab.compare.grid import final_runs
from gradrank.lab.recipes import read

RUN = {
    "model": "tiny-llama",
    "task": "tiny-lm",
    "steps": 1,
    "batch_size": 4,
    "batches": 4,
    "max_length": 16,
    "validation": 30,
    "eval_examples": 20,
    "lr": 1e-3,
    # One calibration for all seeds: what differs between them is the draw.
    "calibration_seed": 7,
}
DRAWN: dict[str, Any] = {
    "random": "random",
    "permuted": {"method": "permuted", "option": {"of": "gradient-norm"}},
    "subset": {"method": "subset", "option": {"choose": "random"}},
}
FIXED: dict[str, Any] = {
    "uniform": "uniform",
    "gradient-norm": "gradient-norm",
    "random": {"method": "random", "option": {"seed": 3}},
}


def ranks_of(folder: Path, method: Any, seeds: list[int]) -> list[dict[str, int]]:
    """The ranks that a method begins with in runs of these seeds."""
    methods = ["uniform"] if method == "uniform" else ["uniform", method]
    recipe = folder / f"{len(list(folder.iterdir()))}.yaml"
    data = {
        "schema": "gradrank.recipe/1",
        "name": "controls",
        "about": "a question",
        "source": "a paper",
        "run": RUN,
        "budgets": ["uniform:2"],
        "seeds": seeds,
        "methods": methods,
    }
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    found = read(recipe)
    bench = Bench(folder / "cache")
    runs = [run for run in final_runs(found, {}) if run.label == found.variants[-1].label]
    records = [carry_out(run, found, bench) for run in runs]
    assert [record.status for record in records] == ["finished"] * len(seeds)
    return [record.ranks_over_time[0][1] for record in records]


@pytest.mark.parametrize("name", DRAWN)
def test_a_control_draws_anew_for_every_seed_of_a_run(name: str, tmp_path: Path) -> None:
    zero, one = ranks_of(tmp_path, DRAWN[name], [0, 1])
    assert zero != one
    assert ranks_of(tmp_path, DRAWN[name], [1]) == [one]


@pytest.mark.parametrize("name", FIXED)
def test_what_draws_nothing_or_was_told_its_seed_is_the_same_for_all(
    name: str, tmp_path: Path
) -> None:
    zero, one = ranks_of(tmp_path, FIXED[name], [0, 1])
    assert zero == one
