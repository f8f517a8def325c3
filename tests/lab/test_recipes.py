"""Recipes: every one in the repository is whole, and wrong ones are refused with what is wrong."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.pilora_parameters.shapes import build_shapes

from gradrank.core.budget import Budget
from gradrank.core.errors import DataError, GradrankError
from gradrank.core.targets import Target
from gradrank.lab.compare.grid import final_runs, stability_runs, tuning_runs
from gradrank.lab.compare.recipe import Recipe
from gradrank.lab.recipes import read
from gradrank.lab.tasks import TASKS
from gradrank.methods.registry import create

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
FULL_SIZE = [path for path in RECIPES if path.parent.name == "recipes"]
GRIDS = sorted((ROOT / "results" / "compare").glob("*/recipe.yaml"))
WHOLE = {
    "schema": "gradrank.recipe/1",
    "name": "one",
    "about": "a question",
    "source": "a paper",
    "run": {"model": "tiny-llama", "task": "tiny-lm", "steps": 4},
    "budgets": ["uniform:2", 5000],
    "seeds": [0, 3],
    "methods": [
        {"method": "uniform"},
        {"label": "a/b", "method": "igu", "option": {"signed": True}},
        {"method": "gard"},
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
    assert recipe.reference in {variant.label for variant in recipe.variants}
    for task, variant, _ in recipe.cells():
        assert recipe.config(task, variant).task in TASKS
    assert "loader comes with" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_recipes_of_full_size_have_five_seeds_and_say_what_they_stand_for(path: Path) -> None:
    recipe = read(path)
    assert len(recipe.seeds) == 5
    paper = {"gard": "GARD", "igu": "IGU-LoRA", "pilora": "PiLoRA"}[path.stem.split("-")[0]]
    assert recipe.source.startswith(paper)
    # Without a search the question is not which method is better.
    assert recipe.rates.everywhere or path.stem == "pilora-figure-3"
    assert path.read_text(encoding="utf-8").startswith("#")


def test_there_is_a_recipe_for_every_table_and_figure_and_a_small_twin() -> None:
    names = [path.stem for path in RECIPES]
    gard = {"gard-table-2", *(f"gard-figure-{n}" for n in (3, 5, 6, 7))}
    igu = {f"igu-{what}" for what in ("glue", "reasoning", "backbones", "parts")}
    igu |= {f"igu-figure-{n}" for n in (3, 4, 5)}
    pilora = {f"pilora-table-{n}" for n in (1, 2, 3, 4)}
    pilora |= {f"pilora-figure-{n}" for n in (3, 4, 5, 6)}
    assert gard | igu | pilora == {path.stem for path in FULL_SIZE}
    # Twins that came before the others carry the names of what they ask.
    other = {
        "igu-figure-3": "igu-ablation",
        "igu-figure-4": "igu-ablation",
        "igu-parts": "igu-ablation",
        "pilora-table-4": "pilora-partition",
        "pilora-figure-4": "pilora-supplementary",
        "pilora-figure-5": "pilora-dominant",
        "pilora-figure-6": "pilora-threshold",
    }
    assert {other.get(path.stem, f"{path.stem}-small") for path in FULL_SIZE} <= set(names)
    # A recipe's runs go to a folder of its name.
    assert len(set(names)) == len(names)


def test_the_page_of_recipes_names_them_all() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    # Those of the results have a page of their own.
    others = {"decoder", "encoder", "vision"}
    named = [path.stem for path in RECIPES if path.stem.split("-")[0] not in others]
    assert [name for name in named if f"`{name}`" not in page] == []


def variants(recipe: Recipe, option: str) -> list[object]:
    return [v.options[option] for v in recipe.variants if option in v.options]


def test_recipes_of_pilora_have_the_values_of_the_paper() -> None:
    found = {path.stem: read(path) for path in RECIPES if path.stem.startswith("pilora-")}
    ranks = variants(found["pilora-figure-4"], "supplementary_rank")
    assert ranks == ["0", "1", "2", "4", "8", "16", "32"]
    assert variants(found["pilora-figure-5"], "dominant_rank") == ["24", "26", "28", "30", "32"]
    thresholds = variants(found["pilora-figure-6"], "threshold")
    assert thresholds == variants(found["pilora-threshold"], "threshold")
    assert thresholds == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    for name in ("pilora-table-4", "pilora-partition"):
        assert {"random", "top_fraction", "mean"} == set(variants(found[name], "rule"))
    for name in ("pilora-table-4", "pilora-partition", *(f"pilora-table-{n}" for n in (1, 2, 3))):
        assert any(v.method == "pilora" and "rank" not in v.options for v in found[name].variants)


def arms(recipe: Recipe) -> set[str]:
    return {variant.method for variant in recipe.variants}


def test_tables_have_the_baselines_of_the_papers() -> None:
    found = {path.stem: read(path) for path in FULL_SIZE}
    common = {"uniform", "dora", "pissa", "milora", "pilora"}
    assert common | {"lora-dash"} <= arms(found["pilora-table-1"])
    assert common | {"rslora"} <= arms(found["pilora-table-2"])
    assert common | {"full"} <= arms(found["pilora-table-3"])
    assert {"uniform", "dora", "adalora", "full", "igu"} <= arms(found["igu-reasoning"])
    assert {"uniform", "adalora", "dylora", "gradient-norm", "depth"} <= arms(
        found["gard-figure-5"]
    )


def test_settings_of_pilora_are_those_of_its_tables() -> None:
    recipe = read(ROOT / "recipes" / "pilora-table-2.yaml")
    found = {task.label: recipe.config(task, recipe.variants[0]) for task in recipe.tasks}
    assert [found[name].epochs for name in ("cola", "qqp", "rte")] == [10, 10, 50]
    assert [found[name].lr for name in ("cola", "sst2", "rte")] == [2e-4, 1e-4, 2e-4]
    assert {(c.batch_size, c.schedule, c.warmup) for c in found.values()} == {(64, "cosine", 100)}
    images = read(ROOT / "recipes" / "pilora-table-3.yaml")
    epochs = [images.config(task, images.variants[0]).epochs for task in images.tasks]
    assert epochs == [35, 76, 12, 11, 15, 14, 4]
    llama = read(ROOT / "recipes" / "pilora-table-1.yaml")
    both = [llama.config(task, llama.variants[0]) for task in llama.tasks]
    assert [config.lr for config in both] == [2e-4, 1e-4]
    assert {(c.batch_size, c.epochs, c.warmup, c.lora_alpha) for c in both} == {(16, 3.0, 100, 64)}


def effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an igu arm with what stands for those that are left out."""
    found = asdict(create("igu", dict(options)))
    alone = found["estimator"] == "unbiased"
    for name, value in (("segments", 8 if alone else 20), ("aggregate", 8 if alone else 1)):
        found[name] = found[name] or value
    return found


@pytest.mark.parametrize("name", ["igu-figure-3", "igu-figure-4", "igu-ablation"])
def test_sweeps_of_igu_change_one_option_of_the_papers_estimator(name: str) -> None:
    recipe = read(next(path for path in RECIPES if path.stem == name))
    arms = {v.label: effective(v.options) for v in recipe.variants if v.method == "igu"}
    base = arms["igu"]
    wanted = {"estimator": "stochastic", "segments": 20, "aggregate": 1, "beta1": 0.85}
    assert {key: base[key] for key in wanted} == wanted
    swept = [label for label in arms if label not in {"igu", "unbiased", "as-code", "no-alpha"}]
    assert {label[0] for label in swept} >= {"M", "N", "b"}
    for label in swept:
        changed = [key for key in base if arms[label][key] != base[key]]
        assert len(changed) == 1, (label, changed)
    assert arms["unbiased"]["estimator"] == "unbiased"
    assert len({str(arm) for arm in arms.values()}) == len(arms)


def test_recipes_of_igu_at_full_size_share_their_length() -> None:
    for path in FULL_SIZE:
        if path.stem.startswith("igu-"):
            recipe = read(path)
            for task in recipe.tasks:
                assert recipe.config(task, recipe.variants[0]).epochs == 5, path.stem


def test_every_recipe_of_igu_has_an_arm_with_the_papers_estimator() -> None:
    for path in RECIPES:
        if path.stem.startswith("igu-"):
            found = [effective(v.options) for v in read(path).variants if v.method == "igu"]
            assert any(
                (arm["estimator"], arm["segments"]) == ("stochastic", 20) for arm in found
            ), path.stem


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


def test_runs_are_whole_with_names_for_folders(tmp_path: Path) -> None:
    recipe = read(written(tmp_path, calibration_seeds=[7]))
    runs = final_runs(recipe, {})
    assert len(runs) == len({run.id for run in runs}) == 12
    assert all(run.config.model == "tiny-llama" and run.config.steps == 4 for run in runs)
    signed = next(run for run in runs if run.label == "a/b" and run.budget == "5000")
    assert signed.options == {"signed": "true"}
    assert signed.id.startswith("final--tiny-lm--a-b--5000--seed0--")
    assert not tuning_runs(recipe)
    assert {run.label for run in stability_runs(recipe)} == {"gard"}


def test_a_later_layer_of_settings_goes_before_an_earlier_one(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        tasks=["tiny-lm", {"label": "long", "task": "tiny-lm", "epochs": 2, "budgets": [9000]}],
        methods=[{"method": "uniform"}, {"method": "gard", "run": {"batches": 4}}],
    )
    recipe = read(path)
    short, long = recipe.tasks
    uniform, gard = recipe.variants
    assert recipe.config(short, uniform).epochs is None
    assert recipe.config(long, uniform).epochs == 2
    assert [recipe.config(short, arm).batches for arm in (uniform, gard)] == [16, 4]
    assert recipe.budgets_of(short, gard) == ("uniform:2", "5000")
    assert recipe.budgets_of(long, gard) == ("9000",)


SEARCH = {"learning_rates": [1e-3, 2e-3], "run": {**WHOLE["run"], "validation": 50}}  # type: ignore[dict-item]


def test_a_search_gives_every_method_as_many_trials(tmp_path: Path) -> None:
    methods = [{"method": "uniform"}, {"method": "full", "learning_rates": [1e-5, 2e-5]}]
    recipe = read(written(tmp_path, **{**SEARCH, "methods": methods}))
    found = [(run.label, run.config.lr) for run in tuning_runs(recipe) if run.budget == "5000"]
    assert found == [("uniform", 1e-3), ("uniform", 2e-3), ("full", 1e-5), ("full", 2e-5)]
    assert {run.seed for run in tuning_runs(recipe)} == {1000}


def test_rates_may_differ_between_budgets(tmp_path: Path) -> None:
    own = {"uniform:2": [3e-3, 4e-3]}
    changes = {
        **SEARCH,
        "learning_rates": {"uniform:2": [1e-2, 2e-2], 5000: [1e-3, 2e-3]},
        "methods": ["uniform", {"method": "gard", "learning_rates": own}],
    }
    recipe = read(written(tmp_path, **changes))
    found = {(run.label, run.budget): set[float]() for run in tuning_runs(recipe)}
    for run in tuning_runs(recipe):
        found[run.label, run.budget].add(run.config.lr)
    assert found == {
        ("uniform", "uniform:2"): {1e-2, 2e-2},
        ("uniform", "5000"): {1e-3, 2e-3},
        ("gard", "uniform:2"): {3e-3, 4e-3},
        ("gard", "5000"): {1e-3, 2e-3},  # what it does not name is the recipe's
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seedz": [1]}, "'seedz'. Did you mean 'seeds'"),
        ({"seeds": None}, "lacks seeds"),
        ({"seeds": []}, "not empty"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [True]}, "different whole numbers"),
        ({"schema": "other/1"}, "other/1"),
        ({"budgets": ["uniform:0"]}, "uniform:0"),
        ({"budgets": ["lots"]}, "'lots' is not understood"),
        ({"run": {"model": "tiny-llama", "task": "tiny-lm", "stepz": 3}}, "Did you mean 'steps'"),
        ({"run": {"model": "tiny-llama", "task": "tiny-lm", "steps": "few"}}, "takes int"),
        ({"run": {"model": "tiny-llama", "task": "tiny-lm", "seed": 3}}, "axis of the grid"),
        ({"run": {"task": "tiny-lm"}}, "'model' is missing"),
        ({"run": {"model": "tiny-llama"}}, "either 'task' or 'data'"),
        ({"run": {"preset": "pilora-glu-cola", "task": "cola"}}, "pilora-glue-cola"),
        ({"tasks": "tiny-lm"}, "'tasks' must be a list"),
        ({"tasks": ["tiny-lm", "tiny-lm"]}, "two tasks labelled 'tiny-lm'"),
        ({"methods": [{"method": "iguu"}]}, "Did you mean 'igu'"),
        ({"methods": [{"method": "dorra"}]}, "Did you mean 'dora'"),
        ({"methods": [{"method": "igu", "option": {"segmentz": 3}}]}, "Did you mean 'segments'"),
        ({"methods": [{"method": "pissa", "option": {"niters": 3}}]}, "Did you mean 'niter'"),
        ({"methods": [{"method": "igu", "option": {"segments": 0}}]}, "segments"),
        ({"methods": [{"method": "igu", "options": {}}]}, "Did you mean 'option'"),
        ({"methods": [{"method": "igu", "option": [1]}]}, "mapping"),
        ({"methods": [{"method": "igu", "option": {"warmup": "one epoch"}}]}, "warmup"),
        ({"methods": [{"method": "uniform"}, {"method": "uniform"}]}, "labelled 'uniform'"),
        ({"methods": [{"method": "gard"}]}, "reference 'uniform' is none of its methods"),
        ({"reference": "unifrom"}, "Did you mean 'uniform'"),
        (
            {"methods": [{"method": "uniform", "budgets": ["uniform:3"]}]},
            "none of those that run",
        ),
        (
            {
                "tasks": ["tiny-lm", {"task": "tiny-sentiment", "budgets": [9000]}],
                "methods": ["uniform", {"method": "gard", "budgets": ["uniform:3"]}],
            },
            "'gard' names the budget 'uniform:3', .* uniform:2, 5000, 9000",
        ),
        (
            {"methods": [{"method": "uniform", "budgets": ["uniform:2"]}, "gard"]},
            "budget '5000': the reference 'uniform' does not run there, .* these do: gard",
        ),
        (
            {
                "tasks": ["tiny-lm", {"task": "tiny-sentiment", "budgets": [9000]}],
                "methods": [{"method": "uniform", "budgets": ["uniform:2", 5000]}, "gard"],
            },
            "task 'tiny-sentiment', budget '9000': the reference 'uniform' does not run",
        ),
        ({"learning_rates": [1e-3]}, "no examples are held out"),
        ({**SEARCH, "tuning_seeds": []}, "'tuning_seeds' is empty"),
        (
            {"run": {**WHOLE["run"], "task": "gsm8k", "scoring": "likelihood"}},  # type: ignore[dict-item]
            "task 'gsm8k' has no fixed choices, .* 'generate'",
        ),
        (
            {"run": {**WHOLE["run"], "scoring": "likelyhood"}},  # type: ignore[dict-item]
            "unknown scoring 'likelyhood'. Did you mean 'likelihood'",
        ),
        ({**SEARCH, "learning_rates": [1e-3, 1e-3]}, "different positive numbers"),
        ({**SEARCH, "learning_rates": [0]}, "different positive numbers"),
        ({**SEARCH, "tuning_seeds": [3]}, "seed 3 both chooses learning rates and is reported"),
        (
            {
                **SEARCH,
                "methods": [{"method": "uniform"}, {"method": "full", "learning_rates": [1]}],
            },
            "'full' searches 1 learning rates at budget 'uniform:2', .* search 2",
        ),
        (
            {**SEARCH, "learning_rates": {5000: [1e-3, 2e-3]}},
            "'uniform' searches 0 learning rates at budget 'uniform:2', .* search 2",
        ),
        ({**SEARCH, "learning_rates": {}}, "'learning_rates' is an empty mapping"),
        ({**SEARCH, "learning_rates": {5000: 1e-3}}, "one such list for each budget"),
        ({**SEARCH, "learning_rates": {"lots": [1e-3]}}, "'lots' is not understood"),
        (
            {**SEARCH, "learning_rates": {"uniform:3": [1e-3]}},
            "'learning_rates' names the budget 'uniform:3', .* uniform:2, 5000",
        ),
        (  # a misspelt budget is told as such, and not as missing trials
            {**SEARCH, "learning_rates": {"uniform:3": [1e-3, 2e-3], 5000: [1e-3, 2e-3]}},
            "'learning_rates' names the budget 'uniform:3', .* uniform:2, 5000",
        ),
        (
            {**SEARCH, "learning_rates": {5000: [1e-3, 2e-3], "5000": [3e-3, 4e-3]}},
            "the key '5000' stands twice",
        ),
        (
            {
                **SEARCH,
                "tasks": [{"task": "tiny-lm", "learning_rates": {9000: [1e-3, 2e-3]}}],
            },
            "task 'tiny-lm': 'learning_rates' names the budget '9000'",
        ),
        (
            {
                **SEARCH,
                "methods": [
                    "uniform",
                    {"method": "gard", "budgets": [5000], "learning_rates": {"uniform:2": [1, 2]}},
                ],
            },
            "method 'gard', under 'learning_rates', names the budget 'uniform:2', .* 5000",
        ),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(GradrankError, match=said):
        read(written(tmp_path, **changes))


def test_a_budget_at_which_nobody_runs_needs_no_reference(tmp_path: Path) -> None:
    # Two budgets are the recipe's; both arms name one of them.
    arms = [{"method": "uniform", "budgets": [5000]}, {"method": "gard", "budgets": [5000]}]
    assert {budget for _, _, budget in read(written(tmp_path, methods=arms)).cells()} == {"5000"}


def test_choices_are_scored_by_likelihood_and_other_tasks_beside_them_stay(tmp_path: Path) -> None:
    run = {"model": "tiny-llama", "steps": 4, "scoring": "likelihood"}
    recipe = read(written(tmp_path, run=run, tasks=["boolq", "commonsense-170k", "tiny-lm"]))
    assert {recipe.config(t, recipe.variants[0]).scoring for t in recipe.tasks} == {"likelihood"}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.parent.name)
def test_recipes_of_the_results_can_be_read_again(path: Path) -> None:
    assert list(read(path).cells())


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="no mapping"):
        read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n", encoding="utf-8")
    with pytest.raises(DataError, match="is not valid YAML"):
        read(tmp_path / "broken.yaml")
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(DataError, match="is not valid YAML"):
        read(tmp_path / "code.yaml")


def test_a_budget_that_is_written_two_ways_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, **SEARCH)
    rates = "learning_rates: {5000: [0.001, 0.002], 5_000: [0.003, 0.004]}"
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("learning_rates"))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith((" ", "-")))
    path.write_text("\n".join([*lines[:start], rates, *lines[end:]]), encoding="utf-8")
    with pytest.raises(GradrankError, match="two keys are written differently and are the same"):
        read(path)
