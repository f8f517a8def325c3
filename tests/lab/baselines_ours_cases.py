"""Settings of an arm on tiny models, for the tests of baselines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gradrank as gr
from cases import CASES, batches
from gradrank.core.budget import Budget
from gradrank.lab.baselines.arm import Setting
from gradrank.signals.facts import find_targets

SCALING, STEPS, RANK = 1.7, 12, 3


def setting(case: str = "llama", budget: int | None = None, **more: Any) -> Setting:
    model = CASES[case].model()
    targets = find_targets(model)
    whole = RANK * sum(target.cost for target in targets)

    def uniform(parameters: int) -> gr.Plan:
        return gr.allocate(targets, "uniform", Budget.parameters(parameters))

    return Setting(
        **{
            "model": model,
            "targets": targets,
            "budget": whole if budget is None else budget,
            "scaling": SCALING,
            "steps": STEPS,
            "seed": 0,
            "batches": lambda count: iter(batches(CASES[case], count)),
            "uniform": uniform,
            **more,
        }
    )


def logits(model: Any, case: str = "llama") -> Tensor:
    with torch.no_grad():
        return model.eval()(**batches(CASES[case], 1, seed=9)[0]).logits


class State:
    """What a Trainer tells its callbacks."""

    def __init__(self) -> None:
        self.global_step = 0


def train(built: Any, case: str = "llama", steps: int = STEPS, repeat: bool = False) -> list[float]:
    """A plain loop that calls the callback as the Trainer does; the losses.

    With ``repeat`` all steps see one batch, which can be learnt by heart.
    """
    trained = [p for p in built.model.parameters() if p.requires_grad]
    optimizer, state, losses = torch.optim.AdamW(trained, lr=1e-2), State(), []
    tell(built.capacity, "on_train_begin", state)
    data = batches(CASES[case], steps)
    for batch in data[:1] * steps if repeat else data:
        tell(built.capacity, "on_step_begin", state)
        loss = built.model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        state.global_step += 1
        tell(built.capacity, "on_step_end", state)
    return losses


def tell(callback: Any, event: str, state: State) -> None:
    if callback is not None:
        getattr(callback, event)(None, state, None)


def same_weights(one: Any, other: Any, names: Sequence[str] = (".lora_",)) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    keys = [key for key in mine if any(name in key for name in names)]
    return bool(keys) and all(torch.equal(mine[key], theirs[key]) for key in keys)
