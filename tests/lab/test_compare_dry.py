"""The dry run: what a recipe would do, from shapes alone, and everything that is wrong with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks.pilora_parameters.shapes import build_shapes

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.arms import moving
from gradrank.lab.compare import dry_arms
from gradrank.lab.compare.dry import rehearsal
from gradrank.lab.compare.dry_models import CONFIGS, config_of, empty_model, outline
from gradrank.lab.compare.dry_tasks import EXAMPLES
from gradrank.lab.compare.grid import final_runs, stability_runs, tuning_runs
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.models import resolve_model
from gradrank.lab.recipes import read
from gradrank.lab.tiny import TINY_MODELS
from gradrank.session import allocate
from gradrank.signals.facts import find_targets
from gradrank.signals.layers import base_parameters

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
RUN = {"model": "tiny-llama", "task": "tiny-lm", "steps": 40, "lora_alpha": 16}


def written(folder: Path, methods: list[Any], **changes: Any) -> Path:
    data = {
        "schema": "gradrank.recipe/1",
        "name": "recipe",
        "about": "a question",
        "source": "a paper",
        "run": RUN,
        "budgets": ["uniform:4"],
        "seeds": [0, 1],
        "methods": methods,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_fit_their_models(path: Path) -> None:
    found = rehearsal(path)
    assert sum(found.runs.values()) > 0
    assert found.steps
    for cell in found.cells:
        assert 0 < cell.footprint.final <= cell.footprint.peak
        assert not cell.footprint.matched or cell.footprint.final <= cell.parameters
    assert "no problem was found" in found.lines()[-1]
    assert json.loads(json.dumps(found.to_dict()))["recipe"] == path.stem


def test_models_have_no_weights() -> None:
    for name in CONFIGS:
        head = "image" if re.search("clip|vit|dinov2", name) else "lm"
        head = "classification" if re.search("bert|minilm", name) else head
        model = empty_model(name, head, 3)
        assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), name


def test_no_weights_and_no_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run read weights or data")

    for name in (
        "safetensors.torch.load_file",
        "transformers.PreTrainedModel.from_pretrained",
        "gradrank.lab.locate.fetch_asset",
        "gradrank.lab.tasks.fetch_asset",
        "gradrank.lab.hub.read_splits",
        "gradrank.lab.data.read_examples",
    ):
        monkeypatch.setattr(name, refuse)
    outline.cache_clear()
    dry_arms._answered.cache_clear()
    names = ["uniform", "gard", "pissa", "eva", "lora-ga"]
    for task in ("movie-review-lm", "sst2", "gsm8k"):
        run = {**RUN, "model": "smollm2-135m", "task": task, "max_length": 64}
        found = rehearsal(written(tmp_path, names, run=run))
        assert [cell.method for cell in found.cells] == names


def test_shapes_are_those_of_the_papers_tables() -> None:
    shapes = build_shapes()
    for name, spec, head in (
        ("LLaMA2-7B", "meta-llama/Llama-2-7b-hf", "instruct"),
        ("LLaMA3-8B", "meta-llama/Meta-Llama-3-8B", "lm"),
        ("RoBERTa-large", "FacebookAI/roberta-large", "classification"),
        ("CLIP ViT-B/32", "openai/clip-vit-base-patch32", "image"),
    ):
        found = outline(spec, head, 2, "all-linear")
        expected = [(t.d_in, t.d_out) for t in shapes[name].targets]
        assert [(t.d_in, t.d_out) for t in found.targets] == expected
    # 8.8 M parameters at uniform rank 16, as IGU-LoRA reports them.
    qwen = outline("Qwen/Qwen2.5-0.5B", "lm", 0, "all-linear")
    assert sum(target.cost for target in qwen.targets) * 16 == 8_798_208
    assert qwen.base_parameters == 494_032_768
    assert outline("smollm2-135m", "lm", 0, "all-linear").base_parameters == 134_515_008


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_outlines_are_those_of_real_models(name: str) -> None:
    head = {"tiny-bert": "classification", "tiny-vit": "image"}.get(name, "lm")
    loaded = resolve_model(name, head, num_labels=3)
    found = outline(name, head, 3, "all-linear")
    assert found.targets == find_targets(loaded.model)
    assert found.base_parameters == base_parameters(loaded.model)
    assert found.max_length == loaded.max_length


def test_a_folder_needs_its_configuration_only(tmp_path: Path) -> None:
    CONFIGS["tiny-gpt2"]().save_pretrained(tmp_path)
    config, source = config_of(str(tmp_path))
    assert (config.model_type, source) == ("gpt2", "local folder")
    run = {**RUN, "model": str(tmp_path)}
    cell = rehearsal(written(tmp_path, ["uniform"], run=run)).cells[0]
    assert cell.model.targets[0].kind == "conv1d"


@pytest.mark.parametrize("task", ["tiny-sentiment", "tiny-images"])
def test_sizes_are_those_of_the_data(task: str) -> None:
    assert EXAMPLES[task] == len(read_examples(DataSpec(task)).train.inputs)


def test_the_mixture_is_the_sum_of_its_parts() -> None:
    parts = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa")
    assert EXAMPLES["commonsense-170k"] == sum(EXAMPLES[name] for name in parts)


def test_parameters_are_those_of_the_plans(tmp_path: Path) -> None:
    names = ["uniform", "depth", "random", "gard", "igu"]
    wide = {"method": "pilora", "option": {"rank": 8}}
    dynamic = {"method": "gard-dynamic", "option": {"interval": 8, "window": 4}}
    found = rehearsal(written(tmp_path, [*names, wide, dynamic]))
    sizes = {cell.method: cell.footprint for cell in found.cells}
    budget = found.cells[0].parameters
    targets = find_targets(resolve_model("tiny-llama").model)
    for name in ("uniform", "depth", "random"):
        assert sizes[name].exact
        assert sizes[name].final == sizes[name].peak == allocate(targets, name, budget).parameters
    # Twice the uniform rank of the budget, as it moves in a run.
    assert moving(allocate(targets, "igu", budget), 40, 0) is not None
    assert sizes["igu"].peak == 8 * sum(target.cost for target in targets)
    assert sizes["pilora"].peak == 2 * budget
    assert sizes["gard-dynamic"].peak == sizes["gard"].final == budget
    assert not sizes["gard"].exact


def test_baselines_are_built_and_counted(tmp_path: Path) -> None:
    names = ["uniform", "dora", "pissa", "milora", "rslora", "lora-dash", "peft-adalora", "eva"]
    run = {**RUN, "model": "tiny-bert", "task": "tiny-sentiment"}
    found = rehearsal(written(tmp_path, [*names, "bitfit", "full"], run=run))
    sizes = {cell.method: cell.footprint for cell in found.cells}
    model: Any = resolve_model("tiny-bert", "classification", num_labels=2).model
    whole, head = base_parameters(model), sum(p.numel() for p in model.classifier.parameters())
    assert found.cells[0].model.head_parameters == head
    assert sizes["full"].final == whole - head
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert sizes["bitfit"].final == sum(b.numel() for b in biases) - model.classifier.bias.numel()
    assert not sizes["full"].matched
    assert not sizes["bitfit"].matched
    budget = found.cells[0].parameters
    assert sizes["pissa"].final == sizes["uniform"].final == budget
    assert sizes["dora"].final <= budget
    assert sizes["peft-adalora"].peak > budget
    assert not sizes["eva"].exact


def test_runs_steps_and_tokens_are_those_of_the_grid(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        ["uniform", "gard", {"method": "depth", "budgets": ["uniform:2"]}],
        run={**RUN, "validation": 40, "max_length": 16, "batch_size": 4},
        tasks=["tiny-lm", {"task": "tiny-sentiment", "steps": 10}],
        budgets=["uniform:2", "uniform:4"],
        learning_rates=[1e-3, 2e-3, 3e-3],
        tuning_seeds=[5, 6],
        calibration_seeds=[7],
    )
    found, recipe = rehearsal(path), read(path)
    assert found.runs == {
        "tune": len(tuning_runs(recipe)),
        "final": len(final_runs(recipe, {})),
        "stability": len(stability_runs(recipe)),
    }
    trained = [*tuning_runs(recipe), *final_runs(recipe, {})]
    assert found.steps == sum(run.config.steps for run in trained)
    assert found.tokens == sum(run.config.steps for run in trained) * 4 * 16


def test_lengths_in_epochs_follow_from_published_sizes(tmp_path: Path) -> None:
    run = {"model": "minilm-l6", "task": "rte", "epochs": 2, "batch_size": 10, "validation": 90}
    cell = rehearsal(written(tmp_path, ["uniform"], run=run)).cells[0]
    assert (cell.length.examples, cell.length.steps) == (2400, 480)
    run = {"model": "tiny-llama", "task": "tiny-lm", "epochs": 2}
    found = rehearsal(written(tmp_path, ["uniform"], run=run))
    assert found.steps is None
    assert "steps follow from the data" in "\n".join(found.lines())


def test_the_table_can_be_read(tmp_path: Path) -> None:
    text = "\n".join(rehearsal(written(tmp_path, ["uniform", "igu", "full"])).lines())
    assert "budget uniform:4 = " in text
    assert re.search(r"uniform +[\d,]+ +[\d,]+ +100.0%  planned without data", text)
    assert re.search(r"igu +<= [\d,]+ +[\d,]+ +100.0%  comes down to the budget", text)
    assert re.search(r"full +[\d,]+ +[\d,]+ +-  not matched", text)
    assert "6 runs: 0 to choose learning rates, 6 reported (2 seeds)" in text
    assert "240 optimizer steps in all" in text


@pytest.mark.parametrize(
    ("methods", "changes", "said"),
    [
        (["uniform"], {"run": {**RUN, "task": "tiny-ml"}}, "Did you mean 'tiny-lm'"),
        (["uniform"], {"run": {**RUN, "task": "tiny-images"}}, "has no 'image' head"),
        (["uniform"], {"run": {**RUN, "model": "tiny-bert"}}, "has no 'lm' head"),
        (["uniform"], {"run": {**RUN, "model": "tiny-lama"}}, "Did you mean 'tiny-llama'"),
        (["uniform"], {"run": {**RUN, "targets": "q_prok"}}, "Did you mean 'q_proj'"),
        (["uniform"], {"run": {**RUN, "max_length": 500}}, "positions for 128 tokens"),
        (["uniform"], {"run": {**RUN, "task": "tiny-sentiment", "validation": 400}}, "Hold out"),
        (["uniform", "bitfit"], {}, "Leave 'bitfit' out for this model"),
        (["uniform"], {"budgets": [200]}, "set 'scaling'"),
        (["uniform"], {"budgets": [200], "run": {**RUN, "scaling": 2.0}}, "below the floor"),
        (["uniform"], {"budgets": [10_000_000]}, "10,000,000"),
        (["uniform", "dora"], {"budgets": ["uniform:1"]}, "not enough for 'dora'"),
        (["uniform", "lora-dash"], {"budgets": ["uniform:1"]}, "'?directions|singular values"),
        (["uniform", "eva"], {"budgets": ["uniform:20"]}, "'eva' needs 40 input features"),
        (["uniform", "lora-ga"], {"budgets": ["uniform:12"]}, "takes 2 r directions"),
        (["uniform", {"method": "igu", "option": {"initial_rank": 2}}], {}, "nothing to take away"),
        (["uniform", {"method": "igu", "option": {"warmup": 90}}], {}, "igu"),
        (
            ["uniform", {"method": "pilora", "option": {"initial_steps": 40}}],
            {},
            "pilora",
        ),
        (
            ["uniform", {"method": "gard", "option": {"r_min": 5}}],
            {},
            "below the floor",
        ),
        (["uniform"], {"run": {"model": "tiny-llama", "data": "mine.csv"}}, "needs 'head'"),
    ],
)
def test_what_cannot_run_is_refused(
    tmp_path: Path, methods: list[Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match="cannot run as it is: 1 problem") as caught:
        rehearsal(written(tmp_path, methods, **changes))
    assert re.search(said, str(caught.value)), str(caught.value)


def test_all_problems_are_told_at_once_with_their_cells(tmp_path: Path) -> None:
    path = written(
        tmp_path, ["uniform", "bitfit", "dora"], budgets=["uniform:1"], tasks=["tiny-lm", "tiny"]
    )
    with pytest.raises(OptionError) as caught:
        rehearsal(path)
    text = str(caught.value)
    assert "recipe 'recipe.yaml' cannot run as it is: 3 problems." in text
    assert "tiny-lm · bitfit · uniform:1: 'bitfit' trains biases" in text
    assert "tiny · uniform · uniform:1; tiny · bitfit · uniform:1; tiny · dora · uniform:1" in text


def test_a_model_whose_shapes_nobody_knows_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shapes of model 'some/body' are not known here"):
        config_of("some/body")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json is missing"):
        config_of(str(tmp_path / "empty"))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not known here"):
        config_of(str(tmp_path))


def test_own_data_is_rehearsed_with_what_was_assumed(tmp_path: Path) -> None:
    run = {"model": "tiny-bert", "data": "mine.csv", "head": "classification", "steps": 4}
    cell = rehearsal(written(tmp_path, ["uniform"], run=run)).cells[0]
    assert cell.data.classes == 2
    assert "2 classes are assumed" in cell.data.note
    assert cell.length.examples is None


def test_the_example_of_the_page_fits_its_model(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert found is not None
    path = tmp_path / "mine.yaml"
    path.write_text(found[1], encoding="utf-8")
    assert {cell.task for cell in rehearsal(path).cells} == {"movie-review-lm", "short"}


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    rehearsal(written(tmp_path, ["uniform", "pissa"]))
    assert torch.zeros(1).device.type == "cpu"
