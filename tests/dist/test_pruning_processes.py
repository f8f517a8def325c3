"""Methods that prune in two gloo processes: they decide as one, and train as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import gradrank as gr
from cases import CASES, tiny_llama
from dist.prune_worker import (
    ALL,
    BUDGET,
    METHODS,
    STEPS,
    WORLD,
    adamw,
    adapter,
    batch,
    build,
    story,
)
from launching import run_ranks

pytestmark = pytest.mark.dist

TIMEOUT = 240
DUE = [3, 5, 6]
# Whose looks are the mean over all mini-batches; the others draw a point for each mini-batch.
EXACT = ("adalora", "grid", "direction", "restart")
Found = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned")
    worker = Path(__file__).with_name("prune_worker.py")
    run_ranks(worker, str(out), "trainer", *METHODS, "refusals", seconds=TIMEOUT)
    return out


def found(folder: Path, part: str) -> list[Found]:
    return [
        (
            json.loads((folder / f"{part}-{rank}.json").read_text()),
            load_file(folder / f"{part}-{rank}.safetensors"),
        )
        for rank in range(WORLD)
    ]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def shared(facts: dict[str, Any]) -> dict[str, Any]:
    """What all processes know; each counts the passes of its own."""
    decisions = [{k: v for k, v in d.items() if k != "passes"} for d in facts["decisions"]]
    return {**facts, "decisions": decisions}


def alone(part: str) -> Found:
    """One process, at real shapes, whose batches hold those of both."""
    method, model = ALL[part], build()
    gr.reserve(model, method, BUDGET)
    optimizer = adamw(model)
    with gr.Controller(model, optimizer, method, BUDGET, STEPS) as controller:
        for step in range(1, STEPS + 1):
            both = [batch(step, process) for process in range(WORLD)]
            model(**{key: torch.cat([b[key] for b in both]) for key in both[0]}).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    gr.settle(model)
    return json.loads(json.dumps(story(controller.run))), adapter(model)


@pytest.mark.parametrize("part", [*METHODS, "trainer"])
def test_both_processes_prune_and_train_alike(folder: Path, part: str) -> None:
    (facts, weights), (other_facts, other_weights) = found(folder, part)
    assert shared(facts) == shared(other_facts)
    assert_equal(weights, other_weights)
    assert [decision["step"] for decision in facts["decisions"]] == DUE
    assert len({*facts["ranks_over_time"][-1][1].values()}) > 1
    spent = [decision["parameters"] for decision in facts["decisions"]]
    assert (
        facts["start"]
        > spent[0]
        > spent[1]
        >= spent[2]
        == sum(tensor.numel() for tensor in weights.values())
    )
    assert spent[2] <= facts["budget"]


@pytest.mark.parametrize("part", EXACT)
def test_two_processes_prune_and_train_as_one_with_all_batches(folder: Path, part: str) -> None:
    facts, weights = found(folder, part)[0]
    wanted, theirs = alone(part)
    assert facts["ranks_over_time"] == wanted["ranks_over_time"]
    for mine, other in zip(facts["decisions"], wanted["decisions"], strict=True):
        for key in {"importance", "attributed", "loss_change"} & other.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-2, abs=1e-6), key
    assert weights.keys() == theirs.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", METHODS)
def test_the_settled_adapter_loads_in_stock_peft(folder: Path, part: str) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / f"{part}-adapter"))
    assert_equal(adapter(loaded), found(folder, part)[0][1])


def test_the_points_of_both_processes_are_drawn_from_one_row(folder: Path) -> None:
    """A look takes one pass, but for points at 1, whose gradient is that of training itself."""
    last = DUE[-1]  # one look per step
    for rank, (facts, _) in enumerate(found(folder, "unbiased")):
        signal = METHODS["unbiased"]._signal()
        points = [signal.draw(0, WORLD * look + rank).points for look in range(last)]
        assert facts["decisions"][-1]["passes"] == sum(point != (1.0,) for point in points)


def test_the_trainer_resumes_bitwise_in_two_processes(folder: Path) -> None:
    for step in (4, 8):
        resumed = found(folder, f"trainer-resumed-{step}")
        for (facts, weights), (again, theirs) in zip(
            found(folder, "trainer"), resumed, strict=True
        ):
            assert shared(facts) == shared(again)
            assert_equal(weights, theirs)


def test_checkpoints_load_in_stock_peft(folder: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / "trainer-out" / "checkpoint-4"))
    example = CASES["llama"].batch(torch.Generator().manual_seed(0))
    assert torch.isfinite(loaded(**example).loss)


def test_what_cannot_work_is_refused_by_name_in_both_processes(folder: Path) -> None:
    for rank in range(WORLD):
        said = json.loads((folder / f"refusals-{rank}.json").read_text())
        assert "DistributedDataParallel" in said["shapes"]
        assert "gradrank.reserve" in said["shapes"]
        assert "gradrank.reserve" in said["plain"]
        assert "FSDP shards them" in said["fsdp"]
        assert "not under FSDP" in said["late"]


class Engine(nn.Module):
    """What DeepSpeed's engine looks like from outside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module, self.peft_config = model, model.peft_config


Engine.__module__ = "deepspeed.runtime.engine"


def test_deepspeed_is_refused_by_name() -> None:
    model = build()
    gr.reserve(model, METHODS["adalora"], BUDGET, fixed=True)
    with pytest.raises(gr.SurgeryError, match=r"'adalora' looks at whole .* DeepSpeed shards them"):
        gr.Controller(Engine(model), adamw(model), METHODS["adalora"], BUDGET, STEPS)
