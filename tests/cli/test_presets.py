"""Presets: the papers' settings, their precedence, lengths in epochs, dropout; runs with them."""

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
import yaml
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from cli.cli_cases import TINY
from gradrank.cli import settings
from gradrank.cli.lengths import in_steps
from gradrank.cli.options import DATA, MEASURING, METHOD, RUNNING, TRAINING, flags
from gradrank.cli.verb import Verb
from gradrank.core.budget import Budget
from gradrank.core.errors import OptionError
from gradrank.core.plan import Plan
from gradrank.lab.tiny import TINY_MODELS
from gradrank.methods.registry import create
from gradrank.presets import presets
from gradrank.signals.facts import find_targets

PRESETS = presets()
LLAMA2, COLA = "pilora-commonsense-llama2-7b", "pilora-glue-cola"
TASKS = {
    "pilora-glue-": ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"),
    "pilora-images-": ("cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn"),
}


@click.command(cls=Verb)
@flags(*DATA, *METHOD, *MEASURING, *TRAINING, *RUNNING, "config")
@click.pass_context
def probe(context: click.Context, **values: object) -> settings.Settings:
    return settings.collect(context, values)


def collected(*args: object) -> settings.Settings:
    return probe.main([str(arg) for arg in args], standalone_mode=False)


def config(tmp_path: Path, **values: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def twin(name: str) -> torch.nn.Module:
    """The preset's architecture, tiny."""
    if "commonsense" in name:
        return LlamaForCausalLM(TINY_MODELS["tiny-llama"]())
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2}
    if "glue" in name:
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=30, **small))
    vision = {**small, "image_size": 8, "patch_size": 4}
    text = {**small, "vocab_size": 30}
    return CLIPForImageClassification(CLIPConfig(text_config=text, vision_config=vision))


def test_every_column_of_the_tables_is_there() -> None:
    expected = {LLAMA2, "pilora-commonsense-llama3-8b"}
    expected |= {start + task for start, tasks in TASKS.items() for task in tasks}
    assert set(PRESETS) == expected
    assert all(one.source.startswith("PiLoRA, Table ") for one in PRESETS.values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole_valid_and_fits_its_architecture(name: str) -> None:
    found = collected("--preset", name)
    settings.check(replace(found, task="tiny-lm"))
    resolved = in_steps(found, 6400)
    method = create(resolved.method, resolved.options)
    size = found.batch_size * found.accumulate
    assert method.initial_steps == 6400 // size
    assert resolved.steps == found.epochs * method.initial_steps
    assert resolved.steps > method.initial_steps
    targets = find_targets(twin(name), found.targets)
    assert {t.depth for t in targets} == {0, 1}
    assert len({t.name.split(".", 4)[-1] for t in targets}) in {5, 6}
    # alpha / r of the paper is 2 in all three tables, and so must the scale be.
    rank = int(method.rank)
    assert Budget.parse(found.budget) == Budget.uniform(rank)
    assert found.lora_alpha / rank == 2


def test_table_5() -> None:
    two, three = (
        collected("--preset", LLAMA2),
        collected("--preset", "pilora-commonsense-llama3-8b"),
    )
    assert (two.lr, three.lr) == (2e-4, 1e-4)
    for found in (two, three):
        assert found.targets == "q_proj,k_proj,v_proj,up_proj,down_proj"
        assert (found.schedule, found.warmup, found.epochs) == ("linear", 100, 3)
        assert (found.batch_size, found.lora_alpha, found.lora_dropout) == (16, 64, 0.05)
        assert found.options["rank"] == "32"
        assert found.options["supplementary_rank"] == "2"
        assert found.options["initial_steps"] == "1 epoch"


def test_tables_6_and_7() -> None:
    glue = {task: collected("--preset", f"pilora-glue-{task}") for task in TASKS["pilora-glue-"]}
    assert [found.lr for found in glue.values()] == [2e-4, 1e-4, 1e-4, 2e-4, 1e-4, 1e-4, 2e-4]
    assert [found.epochs for found in glue.values()] == [10] * 6 + [50]
    images = [collected("--preset", f"pilora-images-{task}") for task in TASKS["pilora-images-"]]
    assert [found.epochs for found in images] == [35, 76, 12, 11, 15, 14, 4]
    assert {found.lr for found in images} == {1e-4}
    for found in (*glue.values(), *images):
        assert (found.schedule, found.warmup, found.batch_size) == ("cosine", 100, 64)
        assert (found.lora_alpha, found.lora_dropout) == (16, 0.05)
        assert found.options["supplementary_rank"] == "1"


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path) -> None:
    path = config(tmp_path, lr=0.5, warmup=7)
    for order in (("--preset", COLA, "--config", path), ("--config", path, "--preset", COLA)):
        found = collected(*order, "--warmup", 9)
        assert (found.lr, found.warmup, found.batch_size) == (0.5, 9, 64)
        assert found.preset == COLA


def test_a_file_may_name_a_preset_and_a_flag_another(tmp_path) -> None:
    path = config(tmp_path, preset=COLA, batch_size=2)
    found = collected("--config", path)
    assert (found.preset, found.batch_size, found.epochs) == (COLA, 2, 10)
    found = collected("--config", path, "--preset", "pilora-glue-rte")
    assert (found.preset, found.batch_size, found.epochs) == ("pilora-glue-rte", 2, 50)


def test_options_are_merged_for_the_method_that_they_are_for(tmp_path) -> None:
    own = ("--option", "rule=mean")
    assert collected("--preset", COLA, *own).options == {
        "rank": "8",
        "supplementary_rank": "1",
        "rule": "mean",
        "initial_steps": "1 epoch",
    }
    assert collected("--preset", COLA, "--method", "uniform").options == {}
    path = config(tmp_path, option={"interval": 3})
    assert collected("--preset", COLA, "--config", path).options["interval"] == "3"
    # The file's options are for the preset's method, unless it names one of its own.
    assert collected("--preset", COLA, "--config", path, "--method", "uniform").options == {}
    path = config(tmp_path, method="gard", option={"energy": 0.5})
    assert collected("--preset", COLA, "--config", path).options == {"energy": "0.5"}


def test_an_unknown_preset_is_told_with_the_nearest(tmp_path) -> None:
    with pytest.raises(OptionError, match="Did you mean 'pilora-glue-cola'"):
        collected("--preset", "pilora-glue-colla")
    with pytest.raises(OptionError, match="preset 'x' is unknown"):
        collected("--config", config(tmp_path, preset="x"))


def test_steps_and_epochs_replace_each_other_by_precedence(tmp_path) -> None:
    def length(*args: object) -> tuple[object, object]:
        found = collected(*args)
        return found.steps, found.epochs

    assert length() == (100, None)
    assert length("--epochs", 2) == (None, 2)
    assert length("--preset", COLA) == (None, 10)
    assert length("--preset", COLA, "--steps", 5) == (5, None)
    assert length("--preset", COLA, "--epochs", 5) == (None, 5)
    path = config(tmp_path, steps=7)
    assert length("--preset", COLA, "--config", path) == (7, None)
    assert length("--config", path, "--epochs", 0.5) == (None, 0.5)


@pytest.mark.parametrize("args", [("--steps", 3, "--epochs", 2), ()])
def test_two_lengths_in_one_place_are_refused(tmp_path, args) -> None:
    if not args:
        args = ("--config", config(tmp_path, steps=3, epochs=2))
    with pytest.raises(OptionError, match=r"given twice, as steps \(3\) and as epochs \(2\)"):
        collected(*args)


def test_what_a_run_with_a_preset_writes_replays_it(tmp_path) -> None:
    first = collected("--preset", LLAMA2, "--lr", 1e-3, "--method", "uniform", "--task", "tiny-lm")
    again = collected("--config", config(tmp_path, **first.replay()))
    assert again == first


def test_epochs_of_a_run_become_steps_and_stay_epochs_in_its_file(run) -> None:
    # tiny-lm has so many training blocks of 16 tokens that half an epoch is a few dozen steps.
    size = ("--batch-size", 32, "--accumulate", 2, "--eval-batches", 1)
    args = ("--model", "tiny-llama", "--task", "tiny-lm", "--max-length", 64, "--method", "uniform")
    result = run("train", *args, *size, "--epochs", 0.5, "--lora-dropout", 0.3, "--out", "a")
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("a/record.json").read_text())
    blocks = Plan.load("a/plan.json").provenance["data"]["train_examples"]
    assert record["cost"]["steps"] == -(-blocks // 128)
    assert record["config"]["steps"] == record["cost"]["steps"]
    written = yaml.safe_load(Path("a/config.yaml").read_text())
    assert written["epochs"] == 0.5
    assert "steps" not in written
    assert json.loads(Path("a/adapter/adapter_config.json").read_text())["lora_dropout"] == 0.3
    again = run("train", "--config", "a/config.yaml", "--out", "b")
    assert again.exit_code == 0, again.stderr
    assert json.loads(Path("b/record.json").read_text())["losses"] == record["losses"]
    done = run("train", "--resume", "--out", "a", "--epochs", 0.5)
    assert done.exit_code == 0, done.stderr
    changed = run("train", "--resume", "--out", "a", "--steps", 4)
    assert "steps None -> 4" in changed.stderr


def test_dropout_makes_training_another_and_leaves_evaluation_alone(run) -> None:
    short = (*TINY, "--method", "uniform", "--steps", 2, "--eval-batches", 1)
    for dropout in (0.0, 0.5):
        result = run("train", *short, "--lora-dropout", dropout, "--out", f"d{dropout}")
        assert result.exit_code == 0, result.stderr
    records = [json.loads(Path(f"d{d}/record.json").read_text()) for d in (0.0, 0.5)]
    first, second = (record["losses"]["train"] for record in records)
    assert first[0] == second[0]  # B is zero, so nothing that is dropped matters yet
    assert first[1] != second[1]


def test_a_preset_trains_a_tiny_model_in_both_stages(run) -> None:
    args = ("--preset", LLAMA2, *TINY, "--batch-size", 64, "--budget", "uniform:8")
    more = ("--option", "rank=8", "--option", "interval=2", "--epochs", 2, "--warmup", 2)
    result = run("train", *args, *more, "--eval-batches", 1, "--out", "a")
    assert result.exit_code == 0, result.stderr
    plan = Plan.load("a/plan.json")
    assert plan.method == "pilora"
    epoch = -(-plan.provenance["data"]["train_examples"] // 64)
    assert int(plan.options["initial_steps"]) == epoch
    record = json.loads(Path("a/record.json").read_text())
    assert record["cost"]["steps"] == -(-plan.provenance["data"]["train_examples"] * 2 // 64)
    assert [decision["step"] for decision in record["decisions"]] == [epoch]


def test_plan_takes_what_it_can_of_a_preset_and_passes_the_rest_on(run) -> None:
    result = run("plan", "--preset", LLAMA2, *TINY, "--out", "p")
    assert result.exit_code == 0, result.stderr
    assert "not used" not in result.stderr
    written = yaml.safe_load(Path("p/config.yaml").read_text())
    assert written["preset"] == LLAMA2
    found = collected("--config", "p/config.yaml")
    assert (found.lr, found.warmup, found.batch_size, found.model) == (2e-4, 100, 4, "tiny-llama")


def test_an_option_in_epochs_needs_data(run, planned) -> None:
    measured = planned / "measurement.safetensors"
    option = ("--method", "pilora", "--option", "initial_steps=1 epoch")
    result = run("plan", "--from", measured, *option)
    assert result.exit_code == 2
    assert "given in epochs" in result.stderr


def test_presets_are_listed(run) -> None:
    result = run("methods", "--presets")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in PRESETS)
    rows = json.loads(run("methods", "pilora", "--presets", "--json").stdout)["presets"]
    assert [row["name"] for row in rows] == list(PRESETS)
    assert "no preset of method 'gard'" in run("methods", "gard", "--presets").stderr
