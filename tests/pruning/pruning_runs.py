"""Whole runs of the methods that prune, in loops of one's own, for the tests beside it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gradrank as gr
from cases import CASES
from dynamic_cases import adamw, adapted, data

STEPS = 10
DUE = [3, 5, 7]  # after a warm-up of one step, and none in the last three
RANK = 2
BUDGET = f"uniform:{RANK}"
SHORT: dict[str, Any] = {"interval": 2, "warmup": 1, "final": 3}
_LOOKS: dict[str, dict[str, Any]] = {
    "igu": {"score_every": 1, "segments": 4, "aggregate": 1},
    "as-code": {"estimator": "as-code", "segments": 4},
    "igu-direction": {"score_every": 1, "segments": 2, "tolerance": 1e6},
    "adalora": {},
}
METHODS = list(_LOOKS)


def pruning(name: str, **options: Any) -> Any:
    """A method with a schedule for ``STEPS`` steps."""
    kind: Any = {"adalora": gr.AdaLora, "igu-direction": gr.IguDirection}.get(name, gr.Igu)
    return kind(**SHORT | _LOOKS[name] | options)


def reserved(method: Any, case: str = "llama", **lora: Any) -> tuple[Any, torch.optim.AdamW]:
    """A tiny model widened for a method, and its optimizer."""
    model = adapted(case, RANK, **lora)
    gr.reserve(model, method, BUDGET)
    return model, adamw(model, 2e-2)


def train(
    model: nn.Module, optimizer: Any, controller: gr.Controller, items: list[dict[str, Tensor]]
) -> list[float]:
    losses = []
    for batch in items:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def pruned(method: Any, case: str = "llama", **lora: Any) -> tuple[Any, Any, gr.Controller]:
    """A whole run, not settled yet."""
    model, optimizer = reserved(method, case, **lora)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    train(model, optimizer, controller, data(case, STEPS))
    return model, optimizer, controller


def everything(model: nn.Module) -> int:
    """Elements of all parameters of the adapter, lambda included."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Elements that the optimizer keeps."""
    return sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def leftovers(model: nn.Module) -> list[str]:
    """What training may not leave behind: forms, and hooks of any kind."""
    found = [n for n, m in model.named_modules() if parametrize.is_parametrized(m)]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_state_dict_hooks", "_load_state_dict_pre_hooks")
    found += [f"{n}.{k}" for n, m in model.named_modules() for k in kinds if getattr(m, k)]
    found += [n for n, p in model.named_parameters() if p._backward_hooks]
    return found


def hooked(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def logits(model: Any, case: str = "llama") -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(**data(case, 1)[0]).logits
    model.train(training)
    return found


def stock(folder: Path, case: str = "llama") -> Any:
    """What PEFT makes of a saved adapter, without gradrank."""
    return PeftModel.from_pretrained(CASES[case].model(), folder)


def timeless(run: Any) -> list[dict[str, Any]]:
    """Decisions without what no two runs share."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in run.decisions]
