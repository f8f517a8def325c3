"""Growth study, part ``training``: whole steps against how often capacity moves, or is looked at.

Uniform LoRA of the same budget is the step in which capacity never moves. IGU-LoRA starts at twice
that rank and is pruned, so that its ratio holds the wider adapter too; how often it looks is what
differs between its rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from benchmarks.growth_points import Point, batches_of, model_of
from benchmarks.setting import Step, optimizer_of, stepper
from benchmarks.timing import ratio, take_turns
from peft import LoraConfig, get_peft_model

import gradrank as gr

Row = dict[str, Any]
_WARMUP = 2


@dataclass(frozen=True)
class TrainingSize:
    """How much is trained.

    Attributes:
        point: The model and its mini-batches.
        steps: Timed steps.
        rank: Rank of uniform LoRA, whose parameters are the budget.
        intervals: Steps τ between decisions of dynamic GARD.
        window: Mini-batches that a decision of it looks at.
        looks: Steps K between two looks of IGU-LoRA.
        pruning: Steps between prunings of IGU-LoRA.
    """

    point: Point
    steps: int = 100
    rank: int = 8
    intervals: tuple[int, ...] = (5, 10, 25, 50)
    window: int = 16
    looks: tuple[int, ...] = (1, 2, 5, 10, 20)
    pruning: int = 20


FULL = TrainingSize(Point())
QUICK = TrainingSize(Point(width=64, layers=1, tokens=32), 10, 2, (5,), 2, (2,), pruning=2)


def cells(size: TrainingSize) -> Iterable[tuple[str, Callable[[], Row]]]:
    """Yield one cell per setting, each with the work that gives its row."""
    for interval in size.intervals:
        yield f"gard-dynamic, interval {interval}", lambda n=interval: gard(size, n)
    for looks in size.looks:
        yield f"igu, look every {looks}", lambda n=looks: igu(size, n)


def gard(size: TrainingSize, interval: int) -> Row:
    """Train with dynamic GARD and with uniform LoRA in turn."""
    method = gr.DynamicGard(interval=interval, window=size.window)
    return compared(size, method, interval)


def igu(size: TrainingSize, looks: int) -> Row:
    """Train with IGU-LoRA and with uniform LoRA of its final budget in turn."""
    method = gr.Igu(score_every=looks, interval=size.pruning, initial_rank=2 * size.rank)
    return compared(size, method, looks)


def compared(size: TrainingSize, method: Any, every: int) -> Row:
    """Return seconds per step, and per decision, beside uniform LoRA."""
    controllers: list[gr.Controller] = []
    steps = {"uniform": trained(size)}
    steps[method.name] = trained(size, method, controllers)
    batches = batches_of(size.point, 8)
    turns = {n: lambda i, s=step: s(batches[i % len(batches)]) for n, step in steps.items()}
    seconds = take_turns(turns, size.steps, _WARMUP)
    [controller] = controllers
    decisions = controller.run.decisions
    controller.close()
    mine, base = seconds[method.name], seconds["uniform"]
    # Looks and decisions are planned, so that a resample holds as many of them as the run.
    kinds = [(number + 1 + _WARMUP) % every == 0 for number in range(size.steps)]
    found = ratio(mine, base, kinds)
    return {
        "method": method.name,
        "every": every,
        "steps": size.steps,
        "uniform_seconds": mean(base),
        "step_seconds": mean(mine),
        "ratio": found.value,
        "interval": list(found.interval) if found.interval else None,
        "decisions": len(decisions),
        "decision_seconds": mean(d["seconds"] for d in decisions) if decisions else None,
        "in_steps": mean(d["seconds"] for d in decisions) / mean(base) if decisions else None,
    }


def trained(
    size: TrainingSize, method: Any = None, controllers: list[gr.Controller] | None = None
) -> Step:
    """Return a step of training, with a controller if there is a method."""
    torch.manual_seed(0)
    rank = size.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(model_of(size.point), config)
    budget = f"uniform:{rank}"
    if method is None:
        return stepper(model, optimizer_of(model))
    if method.name == "igu":
        gr.reserve(model, method, budget)
    optimizer = optimizer_of(model)
    # One step more than is taken, so that the last decision falls into the run.
    total = size.steps + _WARMUP + 1
    controller = gr.Controller(model, optimizer, method, budget, total)
    assert controllers is not None
    controllers.append(controller)
    return stepper(model, optimizer, controller.step)
