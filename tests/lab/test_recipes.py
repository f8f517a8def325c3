"""Recipes: every one in the repository is whole, and wrong ones are refused with what is wrong."""

from pathlib import Path

import pytest
import yaml

from gradrank.cli import runfile
from gradrank.cli.train import command
from gradrank.core.budget import Budget
from gradrank.core.errors import DataError, GradrankError
from gradrank.core.targets import Target
from gradrank.lab.neuron_shapes import build_shapes
from gradrank.lab.recipes import Recipe, read
from gradrank.presets import find_preset

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
WHOLE = {
    "schema": "gradrank.recipe/1",
    "name": "one",
    "about": "a question",
    "source": "a paper",
    "run": {"task": "tiny-lm", "steps": 4},
    "budgets": ["uniform:2", 5000],
    "seeds": [0, 3],
    "methods": [
        {"method": "uniform"},
        {"label": "a/b", "method": "igu", "option": {"signed": True}},
    ],
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    data = {key: value for key, value in {**WHOLE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_whole(path: Path) -> None:
    recipe = read(path)
    assert recipe.name == path.stem
    assert len(recipe.runs()) == len(recipe.variants) * len(recipe.budgets) * len(recipe.seeds)
    assert any(variant.method == "uniform" for variant in recipe.variants)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_runs_of_the_repository_are_configurations_of_train(path: Path) -> None:
    keys = {runfile.key_of(parameter) for parameter in command.params}
    run = read(path).run
    assert set(run) <= keys
    if "preset" in run:
        assert set(find_preset(run["preset"]).run) <= keys
    assert "task" in run


def test_there_are_recipes() -> None:
    names = [path.stem for path in RECIPES]
    assert {"igu-figure-3", "igu-figure-4", "igu-ablation"} <= set(names)
    assert {f"pilora-{what}" for what in ("table-4", "figure-4", "figure-5", "figure-6")} <= set(
        names
    )
    # A recipe's runs go to a folder of its name.
    assert len(set(names)) == len(names)


def variants(recipe: Recipe, option: str) -> list[object]:
    return [v.options[option] for v in recipe.variants if option in v.options]


def test_recipes_of_pilora_have_the_values_of_the_paper() -> None:
    found = {path.stem: read(path) for path in RECIPES if path.stem.startswith("pilora-")}
    ranks = variants(found["pilora-figure-4"], "supplementary_rank")
    assert ranks == [0, 1, 2, 4, 8, 16, 32]
    assert variants(found["pilora-figure-5"], "dominant_rank") == [24, 26, 28, 30, 32]
    thresholds = variants(found["pilora-figure-6"], "threshold")
    assert thresholds == variants(found["pilora-threshold"], "threshold")
    assert thresholds == [0.5, 0.6, 0.7, 0.8, 0.9]
    for name in ("pilora-table-4", "pilora-partition"):
        assert {"random", "top_fraction", "mean"} == set(variants(found[name], "rule"))
        assert any(v.method == "pilora" and "rank" not in v.options for v in found[name].variants)


def _layer(*sizes: tuple[int, int]) -> list[Target]:
    return [Target(f"layers.0.{index}", *size) for index, size in enumerate(sizes)]


def test_budgets_of_figure_4_hold_every_supplementary_rank_at_one_scale() -> None:
    shape = build_shapes()["LLaMA2-7B"]
    named = tuple(f"{part}_proj" for part in ("q", "k", "v", "up", "down"))
    large = [target for target in shape.targets if target.module_type in named]
    smollm2 = _layer(*[(576, 576)] * 2, *[(576, 192)] * 2, *[(576, 1536)] * 2, (1536, 576))
    recipes = {path.stem: read(path) for path in RECIPES}
    for name, targets in (("pilora-figure-4", large), ("pilora-supplementary", smollm2)):
        recipe = recipes[name]
        budget = Budget.parse(recipe.budgets[0])
        rank = max(int(str(value)) for value in variants(recipe, "rank"))
        # With r' = r, A is there twice and B once; no other r' costs more.
        most = sum(rank * (2 * target.d_in + target.d_out) for target in targets)
        assert most <= budget.resolve(targets, 0)
        assert recipe.run["lora_alpha"] / budget.value == 2


def test_runs_are_whole_configurations_with_names_for_folders(tmp_path: Path) -> None:
    runs = read(written(tmp_path)).runs()
    assert list(runs)[:2] == ["uniform--uniform-2--seed0", "uniform--uniform-2--seed3"]
    assert len(runs) == 8
    assert runs["a-b--5000--seed3"] == {
        "task": "tiny-lm",
        "steps": 4,
        "method": "igu",
        "option": {"signed": "true"},
        "budget": "5000",
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seedz": [1]}, "seedz"),
        ({"seeds": None}, "lacks seeds"),
        ({"seeds": []}, "not empty"),
        ({"schema": "other/1"}, "other/1"),
        ({"budgets": ["uniform:0"]}, "0"),
        ({"methods": [{"method": "iguu"}]}, "igu"),
        ({"methods": [{"method": "igu", "option": {"segmentz": 3}}]}, "segments"),
        ({"methods": [{"method": "igu", "option": {"segments": 0}}]}, "segments"),
        ({"methods": [{"method": "igu", "options": {}}]}, "option"),
        ({"methods": [{"method": "igu", "option": [1]}]}, "mapping"),
        ({"methods": [{"method": "igu", "option": {"warmup": "one epoch"}}]}, "warmup"),
        ({"methods": [{"method": "uniform"}, {"method": "uniform"}]}, "uniform"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(GradrankError, match=said):
        read(written(tmp_path, **changes))


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="no mapping"):
        read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n", encoding="utf-8")
    with pytest.raises(DataError, match="could not be read"):
        read(tmp_path / "broken.yaml")
