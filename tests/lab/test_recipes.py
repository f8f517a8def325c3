"""Recipes: every one in the repository is whole, and wrong ones are refused with what is wrong."""

from pathlib import Path

import pytest
import yaml

from gradrank.core.errors import DataError, GradrankError
from gradrank.lab.recipes import read

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


def test_there_are_recipes() -> None:
    assert {"igu-figure-3", "igu-figure-4", "igu-ablation"} <= {path.stem for path in RECIPES}


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
