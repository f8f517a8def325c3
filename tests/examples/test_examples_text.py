"""Examples on text: loops, Trainer with its logs, TRL, 4 bits, GPT-2, GLUE, written patterns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gradrank as gr
from examples.example_cases import (
    effect,
    parameters_on_disk,
    ranks_on_disk,
    run,
    tiny,
    write_glue,
    write_sentences,
)
from gradrank.core.targets import cost_of_rank_one
from gradrank.signals.facts import find_targets

pytestmark = [
    # What a user sees on a machine without a GPU, once.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("data") / "sentences.jsonl")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[gr.Plan]:
    """The plans that a script makes."""
    made: list[gr.Plan] = []
    plan = gr.plan

    def noted(*args: Any, **kwargs: Any) -> gr.Plan:
        made.append(plan(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(gr, "plan", noted)
    return made


def allowed(base: Path, rank: int) -> int:
    return rank * cost_of_rank_one(find_targets(AutoModelForCausalLM.from_pretrained(base)))


def used(plan: gr.Plan) -> dict[str, int]:
    return {name: rank for name, rank in plan.ranks.items() if rank}


def test_a_plain_loop_trains_the_plan(
    llama: Path, data: Path, plans: list[gr.Plan], tmp_path: Path
) -> None:
    run("loop_static", "--model", llama, "--data", data, "--steps", 2, "--out", tmp_path)
    assert plans[0].budget_parameters == allowed(llama, 4)
    assert ranks_on_disk(tmp_path) == used(plans[0])
    assert effect(llama, tmp_path) > 0


def test_a_plain_loop_moves_ranks(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("loop_dynamic", "--model", llama, "--data", data, "--steps", 5, "--interval", 2,
        "--out", tmp_path)  # fmt: skip
    assert len(set(ranks_on_disk(tmp_path).values())) > 1
    assert parameters_on_disk(tmp_path) <= allowed(llama, 4)
    assert effect(llama, tmp_path) > 0
    told = [line for line in capsys.readouterr().out.splitlines() if "moved" in line]
    assert [line.split()[1] for line in told] == ["2", "4"]


def test_the_trainer_moves_ranks_logs_every_decision_and_resumes(
    llama: Path, data: Path, plans: list[gr.Plan], tmp_path: Path
) -> None:
    options = ["--model", llama, "--data", data, "--steps", 5, "--interval", 2, "--out", tmp_path]
    run("trainer", *options)
    ranks, weights = ranks_on_disk(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert ranks != used(plans[0])
    assert parameters_on_disk(tmp_path) <= allowed(llama, 4)
    state = json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text(encoding="utf-8"))
    logged = [entry for entry in state["log_history"] if "gradrank/parameters" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[-1]["gradrank/parameters"] == parameters_on_disk(tmp_path)
    # The Trainer's own entries are all there beside them.
    losses = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert losses == [1, 2, 3, 4, 5]
    for folder in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / folder)
    run("trainer", *options, "--resume")
    assert ranks_on_disk(tmp_path) == ranks
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(again[key], weight) for key, weight in weights.items())


def test_trl_measures_its_own_batches_and_moves_ranks(
    llama: Path, data: Path, plans: list[gr.Plan], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    run("trl_sft", "--model", llama, "--data", data, "--steps", 5, "--interval", 2,
        "--out", tmp_path)  # fmt: skip
    assert ranks_on_disk(tmp_path) != used(plans[0])
    assert parameters_on_disk(tmp_path) <= plans[0].budget_parameters == allowed(llama, 4)
    assert effect(llama, tmp_path) > 0


def test_a_base_in_four_bits(llama: Path, data: Path, plans: list[gr.Plan], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run("four_bit", "--model", llama, "--data", data, "--steps", 2, "--out", tmp_path)
    assert {planned.target.kind for planned in plans[0].targets} == {"quantized-linear"}
    assert plans[0].budget_parameters == allowed(llama, 4)
    assert ranks_on_disk(tmp_path) == used(plans[0])
    assert effect(llama, tmp_path) > 0


def test_gpt2_is_planned_trained_and_merged(
    data: Path, plans: list[gr.Plan], tmp_path: Path
) -> None:
    base = tiny(tmp_path / "gpt2", "gpt2")
    run("gpt2", "--model", base, "--data", data, "--steps", 2, "--budget", "5%",
        "--out", tmp_path / "out")  # fmt: skip
    assert {planned.target.kind for planned in plans[0].targets} == {"conv1d"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    moved = {key.removesuffix(".weight") for key in before if not before[key].equal(merged[key])}
    assert moved == used(plans[0]).keys()


def test_roberta_on_glue(
    plans: list[gr.Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, task = tiny(tmp_path / "roberta", "roberta"), write_glue(tmp_path / "mrpc")
    run("glue", "--model", base, "--data", task, "--steps", 2, "--out", tmp_path / "out")
    assert "eval_accuracy" in capsys.readouterr().out
    assert ranks_on_disk(tmp_path / "out") == used(plans[0])
    keys = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any("classifier" in key for key in keys)  # the new head is saved with the adapter
    assert effect(base, tmp_path / "out", "SEQ") > 0


# --- what other programs make of a plan --------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "ambiguous"])
def written(
    request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[gr.Plan, Path]:
    """A plan with mixed ranks and dropped targets, and the folder that is made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    plan = gr.plan(AutoModelForCausalLM.from_pretrained(llama), [], "random", "uniform:3")
    facts = plan.to_dict()
    facts["targets"]["model.layers.0.mlp.up_proj"]["rank"] = 0
    facts["provenance"]["ambiguous_suffixes"] = request.param == "ambiguous"
    plan = gr.Plan.from_dict(facts)
    plan.save(folder / "plan.json")
    run("written_pattern", folder / "plan.json", "--model", llama, "--out", folder)
    return plan, folder


def scales(model: Any) -> dict[str, tuple[int, float]]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_axolotls_keys_make_the_plan(written: tuple[gr.Plan, Path], llama: Path) -> None:
    plan, folder = written
    keys = yaml.safe_load((folder / "axolotl.yaml").read_text(encoding="utf-8"))
    patterns = [keys.get(f"lora_{what}_pattern", {}) for what in ("rank", "alpha")]
    assert all(
        type(value) is int and value > 0 for pattern in patterns for value in pattern.values()
    )
    config = LoraConfig(
        r=keys["lora_r"],
        lora_alpha=keys["lora_alpha"],
        target_modules=keys["lora_target_modules"],
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    assert len(set(plan.ranks.values())) > 2
    assert scales(model) == {name: (rank, 2.0) for name, rank in used(plan).items()}


def test_an_untrained_adapter_is_gone_on_with(written: tuple[gr.Plan, Path], llama: Path) -> None:
    plan, folder = written
    assert effect(llama, folder / "adapter") == 0
    base = AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    assert scales(model) == {name: (rank, 2.0) for name, rank in used(plan).items()}
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * len(used(plan))
