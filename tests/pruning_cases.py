"""Runs of the methods that prune directions, shared by their tests and the contract exam."""

from typing import Any

import torch
from torch import Tensor

import gradrank as gr
from cases import CASES, batches
from dynamic_cases import adamw, adapted
from gradrank.adapters.view import lora_sites

BUDGET = "uniform:2"
STEPS = 12
# Decisions after steps 4, 6, 8 and 9; three steps with what is left.
COMMON: dict[str, Any] = {"initial_rank": 4, "interval": 2, "warmup": 2, "final": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "igu": {"segments": 3, "score_every": 2},
    # So few tokens and so coarse a path leave a gap that is none of these tests' business.
    "igu-direction": {"segments": 2, "score_every": 2, "tolerance": 1e9},
    "adalora": {},
}
DUE = [4, 6, 8, 9]


def method(name: str, **options: Any) -> Any:
    return gr.METHODS[name](**COMMON | OPTIONS[name] | options)


def started(
    made: Any, case: str = "llama", budget: Any = BUDGET, fixed: bool | None = None, **more: Any
) -> tuple[Any, Any, gr.Controller]:
    """A model, its optimizer and the controller of a run that begins."""
    lora = {key: more.pop(key) for key in list(more) if key == "lora_dropout"}
    model = adapted(case, rank=2, **lora)
    gr.reserve(model, made, budget, fixed=fixed)
    optimizer = adamw(model, lr=2e-2)
    return model, optimizer, gr.Controller(model, optimizer, made, budget, STEPS, **more)


def step(model: Any, optimizer: Any, controller: Any, batch: dict[str, Tensor]) -> float:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
    return loss.item()


def data(case: str = "llama", count: int = STEPS) -> list[dict[str, Tensor]]:
    return batches(CASES[case], count)


def run(made: Any, case: str = "llama", **more: Any) -> tuple[Any, gr.Controller]:
    """A whole run, seeded."""
    model, optimizer, controller = started(made, case, **more)
    torch.manual_seed(1)
    for batch in data(case):
        step(model, optimizer, controller, batch)
    return model, controller


def weights(model: Any) -> dict[str, Tensor]:
    """What is learned, by target and factor, of the components in use."""
    return {
        f"{name}/{factor}": _used(site, factor, tensor.detach()).clone()
        for name, site in lora_sites(model, "default").items()
        for factor, tensor in site.learned().items()
    }


def _used(site: Any, factor: str, tensor: Tensor) -> Tensor:
    if factor in {"B_d", "B_s"}:
        return tensor
    return tensor.narrow(1 if factor == "B" else 0, 0, site.rank)


def cost(controller: Any) -> dict[str, int]:
    return {target.name: target.cost for target in controller.run._targets}


def timeless(controller: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in controller.run.decisions]
