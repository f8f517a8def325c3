"""Capacity that moves in two gloo processes: DDP, FSDP2, accelerate, Trainer, ZeRO-2."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import gradrank as gr
from cases import CASES, tiny_llama
from dist.moving_worker import BUDGET, METHOD, STEPS, WORLD, adamw, adapter, batch, build
from launching import accelerate_launch, run_ranks

pytestmark = pytest.mark.dist

TIMEOUT = 240
PLAIN = ("ddp", "fsdp2", "accelerate")
Found = tuple[dict[str, Any], dict[str, torch.Tensor]]
WORKER = Path(__file__).with_name("moving_worker.py")


def forked(folder: Path, *parts: str) -> Path:
    """Run parts in two processes that pay no imports."""
    run_ranks(WORKER, str(folder), *parts, seconds=TIMEOUT, DS_ACCELERATOR="cpu")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked(tmp_path_factory.mktemp("plain"), *PLAIN)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    accelerate_launch(WORKER, str(folder), "trainer", seconds=TIMEOUT, DS_ACCELERATOR="cpu")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked(tmp_path_factory.mktemp("sharded"), "sharded-trainer")


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


def assert_same(first: list[Found], second: list[Found]) -> None:
    for (facts, weights), (other_facts, other_weights) in zip(first, second, strict=True):
        assert facts == other_facts
        assert_equal(weights, other_weights)


@pytest.fixture(scope="module")
def alone() -> Found:
    """One process that sees the batches of both: the mean of their gradients, twice the window."""
    model = build()
    optimizer = adamw(model)
    run = gr.Controller(model, optimizer, METHOD, BUDGET, STEPS).run
    watch: Any = run._watch
    window = watch._window
    window._rows = type(window._rows)(maxlen=2 * METHOD.window)
    for step in range(1, STEPS + 1):
        for process in range(WORLD):
            (model(**batch(step, process)).loss).backward()
            if process == 0 and window.is_open:
                window.end_step(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= WORLD
        run_step(optimizer)
        run.after_step(step)
        optimizer.zero_grad()
    facts = {"ranks_over_time": run.ranks_over_time}
    return json.loads(json.dumps(facts)), adapter(model)


def run_step(optimizer: torch.optim.Optimizer) -> None:
    """Step without the controller's own hook, which counts on its step()."""
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.step()


@pytest.mark.parametrize("part", PLAIN)
def test_both_processes_move_the_same_capacity(plain: Path, part: str) -> None:
    (facts, weights), (other_facts, other_weights) = found(plain, part)
    assert facts == other_facts
    assert_equal(weights, other_weights)
    assert len(facts["ranks_over_time"]) == 3, "the ranks must have moved twice"
    assert max(facts["parameters"]) <= facts["budget"]


@pytest.mark.parametrize("part", PLAIN)
def test_two_processes_decide_and_train_as_one_with_all_batches(
    plain: Path, part: str, alone: Found
) -> None:
    facts, weights = found(plain, part)[0]
    assert facts["ranks_over_time"] == alone[0]["ranks_over_time"]
    assert weights.keys() == alone[1].keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, alone[1][key], rtol=1e-3, atol=2e-5)


def test_the_settled_adapter_loads_in_stock_peft(plain: Path) -> None:
    weights = found(plain, "ddp")[0][1]
    loaded = PeftModel.from_pretrained(tiny_llama(), str(plain / "ddp-adapter"))
    assert_equal(adapter(loaded), weights)


def test_true_resize_under_ddp_is_refused_before_training(plain: Path) -> None:
    for rank in range(WORLD):
        text = (plain / f"refused-{rank}.txt").read_text()
        assert "DistributedDataParallel" in text
        assert "gradrank.reserve" in text


def test_the_trainer_moves_capacity_under_accelerate_launch(trained: Path) -> None:
    (facts, weights), (other_facts, other_weights) = found(trained, "trainer")
    assert facts == other_facts
    assert_equal(weights, other_weights)
    assert len(facts["ranks_over_time"]) > 1
    assert max(facts["parameters"]) <= facts["budget"]


def test_the_trainer_resumes_bitwise_in_two_processes(trained: Path) -> None:
    assert_same(found(trained, "trainer"), found(trained, "trainer-resumed"))


def test_a_sharded_trainer_moves_capacity_as_ddp_does(trained: Path, sharded: Path) -> None:
    for (facts, weights), (expected, theirs) in zip(
        found(sharded, "sharded-trainer"), found(trained, "trainer"), strict=True
    ):
        assert facts["ranks_over_time"] == expected["ranks_over_time"]
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=2e-5)


def test_a_sharded_trainer_resumes_bitwise(sharded: Path) -> None:
    assert_same(found(sharded, "sharded-trainer"), found(sharded, "sharded-trainer-resumed"))


def test_checkpoints_hold_stock_adapters_of_the_ranks_in_use(trained: Path) -> None:
    folder = trained / "trainer-out" / "checkpoint-8"
    facts = found(trained, "trainer")[0][0]
    ranks = facts["ranks_over_time"][-1][1]
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder))
    assert gr.settle(loaded) == ranks
    example = CASES["llama"].batch(torch.Generator().manual_seed(0))
    assert torch.isfinite(loaded(**example).loss)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero2_moves_the_same_capacity(
    tmp_path_factory: pytest.TempPathFactory, alone: Found
) -> None:
    folder = forked(tmp_path_factory.mktemp("zero2"), "zero2")
    (facts, weights), (other_facts, other_weights) = found(folder, "zero2")
    assert facts == other_facts
    assert_equal(weights, other_weights)
    assert facts["ranks_over_time"] == alone[0]["ranks_over_time"]
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, alone[1][key], rtol=1e-3, atol=2e-5)
