"""Recipes and configurations: YAML that anybody may have written."""

import contextlib
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hypothesis import given

from fuzz.mutations import SEEDS, damaged, fuzzed, read_or_refused, spoilt
from gradrank.cli import runfile, settings
from gradrank.cli.train import command
from gradrank.core.errors import DataError
from gradrank.lab import recipes
from gradrank.presets.strict import LARGEST, read_yaml

RECIPE = yaml.safe_load("""
schema: gradrank.recipe/1
name: small
about: a question
source: the tests
run: {model: tiny-llama, task: tiny-lm, steps: 3, batch_size: 4, lr: 1.0e-3, validation: 30}
tasks: [{task: tiny-lm, label: one}, {task: tiny-lm, label: two, lr: 0.1, budgets: [2000]}]
learning_rates: [0.001, 0.01]
tuning_seeds: [7]
calibration_seeds: [8, 9]
budgets: ["uniform:1", 3000, 0.5%]
seeds: [0, 1]
reference: uniform
methods:
  - uniform
  - {method: gard, option: {energy: 0.5}, label: low, run: {batches: 3}}
  - {method: gard-dynamic, option: {interval: 3}, budgets: ["uniform:1"]}
""")
CONFIG = {
    "model": "tiny-llama",
    "task": "tiny-lm",
    "method": "gard",
    "option": {"energy": 0.5, "r_max": None},
    "budget": "uniform:2",
    "batches": 3,
    "batch-size": 4,
    "lr": "1e-3",
    "steps": 5,
    "weight_decay": 0.1,
    "lora_alpha": 8,
    "seed": 3,
    "targets": ["q_proj", "v_proj"],
    "gradient_checkpointing": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml")


def written(folder: Path, data: Any, seed: int) -> Path:
    path = folder / "x.yaml"
    if seed % 2:
        path.write_text(yaml.safe_dump(damaged(data, seed), sort_keys=False), encoding="utf-8")
    else:
        path.write_bytes(spoilt(yaml.safe_dump(data, sort_keys=False).encode(), seed))
    return path


@fuzzed(100)
@given(seed=SEEDS)
def test_recipes(folder: Path, seed: int) -> None:
    path = written(folder, RECIPE, seed)
    found = read_or_refused(lambda: recipes.read(path))
    if found is not None:
        from gradrank.lab.compare.grid import stability_runs, tuning_runs

        read_or_refused(lambda: [*tuning_runs(found), *stability_runs(found)])


@fuzzed(150)
@given(seed=SEEDS)
def test_configurations(folder: Path, seed: int) -> None:
    path = written(folder, CONFIG, seed)

    def work() -> Any:
        with click.Context(command) as context:
            runfile.use(context, command.params[0], path)
            with contextlib.suppress(click.ClickException):
                command.parse_args(context, [])
            if not context.params:
                return None  # refused by click, in its words
            chosen = settings.collect(context, context.params)
            settings.check(chosen)
            return chosen

    found = read_or_refused(work)
    if found is not None:
        again = folder / "again.yaml"
        runfile.write(again, found.replay(), "train")
        assert read_yaml(again, "config")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [1]\nb: *a", "aliases"),
        ("a: 1\na: 2", "twice"),
        ("batch-size: 1\nbatch_size: 2", "twice"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("#" * (LARGEST + 1), "larger than 64 KiB"),
        ("[" * 5000, "not valid YAML"),
        ('a: "\\ud800"', "not valid YAML"),
        ("a: " + "1" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_settings_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with (
        pytest.raises((DataError, settings.OptionError), match=says),
        click.Context(command) as context,
    ):
        runfile.use(context, command.params[0], path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGE = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize("bomb", [BOMB, MERGE], ids=["aliases", "merges"])
def test_a_few_bytes_do_not_become_gigabytes(tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"{bomb}budget: *k\n", encoding="utf-8")
    limit = 3 << 30

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    for verb in (("plan", "--config", path), ("compare", path)):
        done = subprocess.run(
            [sys.executable, "-c", "from gradrank.cli.main import main; main()", *map(str, verb),
             "--out", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=bounded,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "aliases" in done.stderr
        assert len(done.stderr) < 1000
