"""Whole runs of `pilora` in loops of one's own, for the tests beside it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import gradrank as gr
from cases import randomise_adapter
from dynamic_cases import adamw, adapted, data
from gradrank.adapters.view import lora_sites
from gradrank.core.partition import NeuronPartition

RANK, STEPS, INITIAL = 4, 8, 4
BUDGET = f"uniform:{RANK}"
SHORT: dict[str, Any] = {
    "rank": RANK,
    "supplementary_rank": 1,
    "interval": 2,
    "initial_steps": INITIAL,
}


def pilora(**options: Any) -> gr.PiLora:
    return gr.PiLora(**SHORT | options)


def reserved(method: Any, case: str = "llama", trained: bool = False, **lora: Any) -> Any:
    """A tiny model in the shape of the first stage; ``trained``: with a B that is not zero."""
    model = adapted(case, method.rank, **lora)
    gr.reserve(model, method, BUDGET)
    return randomise_adapter(model) if trained else model


def started(method: Any, case: str = "llama", **more: Any) -> tuple[Any, Any, gr.Controller]:
    model = reserved(method, case, **more)
    optimizer = adamw(model, 2e-2)
    return model, optimizer, gr.Controller(model, optimizer, method, BUDGET, STEPS)


def factors(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name, A and B of every target in the first stage."""
    for name, site in lora_sites(model, "default").items():
        yield name, site.raw("A"), site.raw("B")


def row_sums(model: nn.Module) -> dict[str, Tensor]:
    """Row sums of the whole ``|B G^A + G^B A|`` in double precision, from ``.grad`` as it is."""
    found = {}
    for name, A, B in factors(model):
        zeros = [torch.zeros_like(t, dtype=torch.float64) for t in (A, B)]
        grad_A, grad_B = (
            z if t.grad is None else t.grad.double() for t, z in zip((A, B), zeros, strict=True)
        )
        found[name] = (B.detach().double() @ grad_A + grad_B @ A.detach().double()).abs().sum(1)
    return found


def above_mean(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (found > found.mean()).long() for name, found in sums.items()}


class Loop:
    """A run of any length, beside a count of hits that is made from ``.grad`` before clipping.

    Args:
        clip: What is done to gradients before the optimizer's step.
        micro: Micro-batches that each mini-batch is cut into.
        context: Autocast, or nothing.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        controller: gr.Controller,
        clip: Callable[[Any], Any] | None = None,
        micro: int = 1,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.optimizer, self.controller = model, optimizer, controller
        self.clip, self.micro, self.context = clip, micro, context
        self.hits: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> None:
        size = len(batch["labels"]) // self.micro
        total = 0.0
        for start in range(0, size * self.micro, size):
            part = {key: value[start : start + size] for key, value in batch.items()}
            with self.context():
                loss = self.model(**part).loss / self.micro
            loss.backward()
            total += float(loss.detach())
        run = self.controller.run
        if run.course.schedule.observes(run.step + 1):
            for name, hit in above_mean(row_sums(self.model)).items():
                self.hits[name] = self.hits.get(name, 0) + hit
        if self.clip is not None:
            self.clip([p for p in self.model.parameters() if p.requires_grad])
        self.optimizer.step()
        self.controller.step()
        self.optimizer.zero_grad()
        self.losses.append(total)

    def run(self, items: list[dict[str, Tensor]]) -> "Loop":
        for batch in items:
            self.step(batch)
        return self


def whole(method: Any, case: str = "llama", **more: Any) -> tuple[Any, Any, gr.Controller]:
    """A whole run, not settled yet."""
    model, optimizer, controller = started(method, case, **more)
    Loop(model, optimizer, controller).run(data(case, STEPS))
    return model, optimizer, controller


def counted(controller: gr.Controller) -> dict[str, Tensor]:
    course: Any = controller.run.course
    return dict(course.hits)


def same_counts(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def splits(controller: gr.Controller) -> dict[str, NeuronPartition]:
    """The partitions that a run has decided on, also of targets that are plain since."""
    found: Any = controller.run.neurons
    return {name: NeuronPartition.from_dict(entry) for name, entry in found["targets"].items()}


def doubled(case: str, count: int) -> list[dict[str, Tensor]]:
    """Mini-batches of two of the usual ones each."""
    items = data(case, 2 * count)
    pairs = zip(items[::2], items[1::2], strict=True)
    return [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in pairs]
