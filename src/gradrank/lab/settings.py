"""How to train, checked, and in the Trainer's own words."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from gradrank.core.errors import OptionError, nearest

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
PRECISIONS = ("auto", "float32", "bfloat16")
# Settings that may differ between a run and its resumption, because they leave the result alone.
_FREE = {"eval_every", "eval_batch_size", "max_eval_batches", "save_every", "keep_checkpoints"}
_FREE |= {"workers"}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        lr: Peak learning rate of AdamW.
        schedule: ``linear`` or ``cosine`` (both to zero) or ``constant``, after ``warmup`` steps.
        warmup: Steps over which the rate rises from zero.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; 0 never clips.
        seed: Seed of data order and dropout.
        precision: Autocast of forward and backward: ``bfloat16``, ``float32`` (none) or ``auto``
            (bfloat16 on a GPU that has it).
        gradient_checkpointing: Recompute activations to save memory.
        group_by_length: Make batches of texts of like length (see :mod:`gradrank.lab.grouping`).
        workers: Processes that prepare batches beside training; 0: training does it itself.
        eval_every: Evaluate after every so many steps, and always at the end; 0: at the end only.
        eval_batch_size: Examples at a time in evaluation; None: ``batch_size``.
        max_eval_batches: Evaluate on so many batches only, drawn from the whole split (the same
            for every seed); None: on all.
        save_every: Write a checkpoint every so many steps; 0: only when interrupted.
        keep_checkpoints: Checkpoints to keep, at least 2 (one may be cut off in writing).
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 2e-4
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    workers: int = 0
    eval_every: int = 0
    eval_batch_size: int | None = None
    max_eval_batches: int | None = None
    save_every: int = 0
    keep_checkpoints: int = 2

    def check(self) -> None:
        """Check all values.

        Raises:
            OptionError: If any is out of its range; all are named.
        """
        least = {"steps": 1, "batch_size": 1, "accumulation": 1, "warmup": 0, "eval_every": 0}
        least |= {"save_every": 0, "keep_checkpoints": 2, "weight_decay": 0, "max_grad_norm": 0}
        least |= {"seed": 0, "eval_batch_size": 1, "max_eval_batches": 1, "workers": 0}
        wrong = [
            f"{name} is {getattr(self, name)}, at least {bound} is needed"
            for name, bound in least.items()
            if getattr(self, name) is not None and not getattr(self, name) >= bound
        ]
        if not 0 < self.lr < float("inf"):
            wrong.append(f"lr is {self.lr}, a positive number is needed")
        if self.schedule not in SCHEDULES:
            wrong.append(
                f"schedule '{self.schedule}' is unknown. {nearest(self.schedule, SCHEDULES)}"
            )
        if self.precision not in PRECISIONS:
            wrong.append(
                f"precision '{self.precision}' is unknown. {nearest(self.precision, PRECISIONS)}"
            )
        if wrong:
            raise OptionError("; ".join(wrong) + ".")

    def binding(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run it resumes."""
        return {
            name: value
            for name, value in asdict(self).items()
            # A setting that came later binds only who uses it: older checkpoints do not have it.
            if name not in _FREE and (name != "group_by_length" or value)
        }


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which forward and backward are computed, or None for the model's own.

    Args:
        precision: A name in ``PRECISIONS``.
        device: Where the model is.
    """
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and able) else None


def checkpointing_arguments(on: bool) -> dict[str, Any]:
    """Return the Trainer's arguments for recomputing activations.

    Args:
        on: Whether to recompute.

    Returns:
        Keyword arguments; empty if off. transformers 5 renamed them between minor versions and
        warns about the old names.
    """
    if not on:
        return {}
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def trainer_arguments(
    settings: TrainSettings, folder: Path, device: torch.device, examples: int
) -> TrainingArguments:
    """Return the Trainer's arguments.

    Args:
        settings: How to train.
        folder: Where checkpoints go.
        device: Where the model is.
        examples: Size of the training data.

    Returns:
        The arguments: the Trainer itself neither evaluates, logs nor reports anywhere.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        seed=settings.seed,
        bf16=autocast_dtype(settings.precision, device) is not None,
        use_cpu=device.type == "cpu",
        **checkpointing_arguments(settings.gradient_checkpointing),
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # An incomplete last batch would make steps unequal; tiny data may have nothing else.
        dataloader_drop_last=examples >= settings.batch_size,
        dataloader_pin_memory=device.type == "cuda",
        # Not kept from epoch to epoch: kept ones draw one random number less, and dropout differs.
        dataloader_num_workers=settings.workers,
        # Steps looks at every loss; a second look would make the host wait twice more.
        logging_nan_inf_filter=False,
    )
    if device.type == "cuda":
        # With several GPUs in sight the Trainer would split batches over all of them. Reading the
        # property first makes the Trainer find its device; then one GPU is what it works with.
        _ = arguments.n_gpu
        arguments._n_gpu = 1
    return arguments
