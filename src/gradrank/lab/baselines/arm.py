"""What a baseline gets and gives: a fresh model in, a model ready to be trained out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from gradrank.core.plan import Plan
from gradrank.core.targets import Target
from gradrank.lab.train import Capacity

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """What an arm of a comparison may use to build its model.

    Attributes:
        model: A fresh model with its head, on its device; it is the arm's to wrap.
        targets: Modules that may be adapted, in model order.
        budget: Adapter parameters that may be spent; the head's are not counted.
        scaling: Scale of the update that all arms share (``lora_alpha / r`` of plain LoRA), so
            that capacity is compared and not scale.
        steps: Optimizer steps of the run.
        seed: Seed of the run.
        batches: ``batches(count)`` draws calibration batches of training data, on the device.
        uniform: ``uniform(parameters)`` returns the plan of uniform LoRA within so many
            parameters, for arms that are LoRA of that shape with something changed.
        peft_options: What every PEFT configuration gets: ``task_type``, ``modules_to_save``,
            ``lora_dropout``, as far as they apply.
        head: Names of the modules of a task head that is trained in full with every arm; empty
            for language modelling.
        warmed: ``with warmed():`` has the head trained for the recipe's ``head_steps`` while the
            block lasts, as for gradrank's own measurements, and puts it back; for arms that start
            from gradients, which behind a new head are mostly noise.
    """

    model: nn.Module
    targets: tuple[Target, ...]
    budget: int
    scaling: float
    steps: int
    seed: int
    batches: Callable[[int], Iterator[Batch]]
    uniform: Callable[[int], Plan]
    peft_options: Mapping[str, Any] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    warmed: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Built:
    """What an arm gives.

    Attributes:
        model: The model with everything trainable that shall be trained, and nothing else.
        capacity: A Trainer callback that moves capacity while training, if the arm has one.
        ranks: Rank per target at the start, where ranks are what the arm is about; for the record.
        finish: Called after training and before evaluation, on the trained model; for arms whose
            trained form is not the one that is evaluated.
        notes: What a reader of the result must know (parameters that could not be matched, ...).
    """

    model: Any
    capacity: Capacity | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    finish: Callable[[Any], None] | None = None
    notes: tuple[str, ...] = ()


class Baseline(Protocol):
    """A baseline: a frozen dataclass whose fields are its options, as methods are.

    Attributes:
        name: As in the registry.
        summary: One line for listings.
        source: Paper, and whose code does the work.
        matched: Whether it can be held to a budget of parameters. Arms that cannot (bias-only,
            full fine-tuning) are shown beside the others and never tested against them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    matched: ClassVar[bool]

    def build(self, setting: Setting) -> Built:
        """Return the model to train.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model, and what goes with it.

        Raises:
            OptionError: If the arm cannot take the model; the message says why.
            BudgetError: If the budget is below what the arm needs.
        """
        ...


def widened(before: torch.dtype | None) -> tuple[str, ...]:
    """Return the note of an arm that had to cast the whole model for its training.

    Args:
        before: Dtype of the model before; None if nothing was cast.

    Returns:
        One note or none.
    """
    if before is None:
        return ()
    kind = str(before).removeprefix("torch.")
    return (f"The model was loaded in {kind} and is held in float32, in which it is trained.",)


def frozen(model: nn.Module, head: Sequence[str]) -> None:
    """Freeze a model except for its task head.

    Args:
        model: The model.
        head: Names of modules that stay trainable.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in head
