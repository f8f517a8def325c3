"""`pilora` in two gloo processes: they count and split as one, and train as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import gradrank as gr
from cases import tiny_llama
from dist.prune_worker import BUDGET, NEURONS, STEPS, WORLD, adamw, adapter, build
from dist.test_pruning_processes import TIMEOUT, Engine, alone, assert_equal, found
from gradrank.core.partition import NeuronPartition
from launching import run_ranks

pytestmark = pytest.mark.dist

SPLIT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split")
    worker = Path(__file__).with_name("prune_worker.py")
    parts = ("trainer:pilora", *NEURONS, "refusals:pilora")
    run_ranks(worker, str(out), *parts, seconds=TIMEOUT)
    return out


def splits(facts: dict[str, Any]) -> dict[str, NeuronPartition]:
    targets = facts["neurons"]["targets"]
    return {name: NeuronPartition.from_dict(entry) for name, entry in targets.items()}


@pytest.mark.parametrize("part", [*NEURONS, "trainer"])
def test_both_processes_count_split_and_train_alike(folder: Path, part: str) -> None:
    (facts, weights), (other_facts, other_weights) = found(folder, part)
    assert facts == other_facts
    assert_equal(weights, other_weights)
    (entry,) = facts["decisions"]
    assert (entry["step"], entry["looks"]) == (SPLIT, 2)
    assert any(0 < hit < 2 for hits in facts["hits"].values() for hit in hits)
    assert any(split.is_split for split in splits(facts).values())
    assert entry["parameters"] <= facts["budget"]
    assert entry["parameters"] == sum(
        split.parameters(weights[f"base_model.model.{name}.lora_A.default.weight"].shape[1])
        for name, split in splits(facts).items()
        if split.lora_rank
    )


@pytest.mark.parametrize("part", NEURONS)
def test_two_processes_count_and_train_as_one_with_all_batches(folder: Path, part: str) -> None:
    facts, weights = found(folder, part)[0]
    wanted, theirs = alone(part)
    assert facts["hits"] == wanted["hits"]
    assert splits(facts) == splits(wanted)
    assert facts["ranks_over_time"] == wanted["ranks_over_time"]
    assert weights.keys() == theirs.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", NEURONS)
def test_the_settled_adapter_loads_in_stock_peft(folder: Path, part: str) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / f"{part}-adapter"))
    assert_equal(adapter(loaded), found(folder, part)[0][1])


@pytest.mark.parametrize("step", [4, 8])
def test_the_trainer_resumes_bitwise_in_either_stage(folder: Path, step: int) -> None:
    resumed = found(folder, f"trainer-resumed-{step}")
    for (facts, weights), (again, theirs) in zip(found(folder, "trainer"), resumed, strict=True):
        assert facts == again
        assert_equal(weights, theirs)


@pytest.mark.parametrize("step", [4, 8])
def test_checkpoints_of_both_stages_load_in_stock_peft(folder: Path, step: int) -> None:
    saved = folder / "trainer-out" / f"checkpoint-{step}"
    loaded = PeftModel.from_pretrained(tiny_llama(), str(saved))
    found_ranks = {t.shape[0] for name, t in adapter(loaded).items() if ".lora_A." in name}
    # A target without a dominant row has r' alone.
    assert found_ranks == ({2} if step < SPLIT else {1, 3})


def test_what_cannot_work_is_refused_by_name_in_both_processes(folder: Path) -> None:
    for rank in range(WORLD):
        said = json.loads((folder / f"refusals-{rank}.json").read_text())
        assert "DistributedDataParallel" in said["shapes"]
        assert "gradrank.reserve" in said["shapes"]
        assert "gradrank.reserve" in said["plain"]
        assert "'pilora' looks at whole gradients" in said["fsdp"]
        assert "FSDP shards them" in said["fsdp"]
        assert "FSDP" in said["late"]


def test_deepspeed_is_refused_by_name() -> None:
    model = build()
    gr.reserve(model, NEURONS["pilora"], BUDGET, fixed=True)
    with pytest.raises(gr.SurgeryError, match=r"'pilora' looks at whole .* DeepSpeed shards them"):
        gr.Controller(Engine(model), adamw(model), NEURONS["pilora"], BUDGET, STEPS)
