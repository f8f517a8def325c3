"""Fine-tune a model with the transformers Trainer, and say exactly what it cost and gave."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PrinterCallback

from gradrank.adapters import apply as adapters
from gradrank.core.errors import GradrankError, OptionError
from gradrank.core.shortage import is_out_of_memory
from gradrank.lab.checkpoints import check_same_adapter, last_complete, read_state
from gradrank.lab.encode import TaskData, size_of
from gradrank.lab.evaluate import Evaluation, evaluate, without_cache
from gradrank.lab.grouping import sampler_for
from gradrank.lab.memory import PeakMemory
from gradrank.lab.settings import TrainSettings, autocast_dtype, trainer_arguments
from gradrank.lab.stopping import Stopper
from gradrank.lab.trainer import RunTrainer, Steps
from gradrank.prepare import prepare_trainer

Progress = Callable[[int, int, float, float], None]


class Capacity(Protocol):
    """A Trainer callback that moves capacity: gradrank's own, or the lab's driver of AdaLoRA."""

    @property
    def ranks_over_time(self) -> list[Any]:
        """``[step, {target: rank}]``, the ranks at the start first."""
        ...

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """One entry per decision."""
        ...

    @property
    def start_parameters(self) -> int | None:
        """Adapter parameters in use when the run began."""
        ...

    @property
    def neurons(self) -> dict[str, Any] | None:
        """Neuron partitions and what they rest on, of methods that split neurons."""
        ...

    def close(self) -> None:
        """Remove all hooks."""
        ...


@dataclass
class TrainOutcome:
    """What a training run gave.

    Attributes:
        status: ``finished``, ``interrupted`` or ``failed``.
        message: Why it is not finished and what to do, else empty.
        steps: Optimizer steps done, those before a resumption included.
        losses: ``[step, loss]`` of every step, nats per predicted item.
        eval_losses: ``[step, loss]`` of every evaluation.
        metrics: Final metrics; empty if not finished.
        train_seconds: Wall time of training, evaluations left out; resumed parts included.
        eval_seconds: Wall time of all evaluations.
        peak_memory_bytes: Peak while training (see :mod:`gradrank.lab.memory`).
        tokens: Tokens (for pictures: examples) that went through training.
        positions: The same with the tokens of padding.
        resumed_from: Step of the checkpoint that was resumed, or None.
        adapter_parameters: Trainable parameters of the adapter.
        other_parameters: Other trainable parameters (a task head).
        ranks_over_time: ``[step, {target: rank}]`` where ranks moved while training.
        decisions: What was decided while training, as :class:`gradrank.RunRecord` keeps it.
        neurons: Neuron partitions and what they rest on, as the record keeps them.
        items: What was predicted for each item of the evaluation split, as the record keeps it.
    """

    status: str = "finished"
    message: str = ""
    steps: int = 0
    losses: list[list[float]] = field(default_factory=list)
    eval_losses: list[list[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    peak_memory_bytes: int = 0
    tokens: int = 0
    positions: int = 0
    resumed_from: int | None = None
    adapter_parameters: int = 0
    other_parameters: int = 0
    ranks_over_time: list[Any] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    neurons: dict[str, Any] | None = None
    items: dict[str, Any] | None = None


def train(
    model: Any,
    data: TaskData,
    settings: TrainSettings,
    out: Path,
    on_progress: Progress | None = None,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    capacity: Capacity | None = None,
    finish: Callable[[Any], None] | None = None,
) -> TrainOutcome:
    """Fine-tune the trainable parameters of a model.

    The first Ctrl-C (or SIGTERM) stops after the current step and writes a checkpoint; a second
    one stops at once. Neither raises: the outcome says ``interrupted``.

    Args:
        model: The model, on its device, with its adapter attached.
        data: Encoded data.
        settings: How to train.
        out: Folder of the run; checkpoints go to ``out/checkpoints``.
        on_progress: Called after each step with the step, all steps, the step's loss and the
            expected seconds left.
        resume: Go on from the newest whole checkpoint, if there is one.
        say: Receives one line when something needs to be said.
        capacity: Moves LoRA capacity while training.
        finish: Called with the trained model before its last evaluation.

    Returns:
        The outcome. Divergence, lack of memory, a full disk and an interruption are told in
        ``status`` and ``message``, so that what was learnt up to there can still be recorded.
    """
    settings.check()
    tell = say or (lambda _message: None)
    adapter, other = count_trainable(model)
    outcome = TrainOutcome(adapter_parameters=adapter, other_parameters=other)
    folder = Path(out) / "checkpoints"
    run = _Run(model, data, settings, folder, outcome, on_progress, capacity)
    run.finish = finish
    checkpoint = run.find_checkpoint(tell) if resume else None
    device = next(model.parameters()).device
    memory = PeakMemory(device)
    try:
        with memory, without_cache(model), Stopper(tell) as stopper:
            run.train(checkpoint, stopper)
    except KeyboardInterrupt:
        outcome.status = "interrupted"
    except (GradrankError, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        outcome.status, outcome.message = "failed", run.explain(error)
    outcome.peak_memory_bytes = memory.peak
    run.close()
    if outcome.status == "interrupted":
        outcome.message = run.how_to_resume()
    return outcome


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Count trainable parameters.

    Args:
        model: The model.

    Returns:
        Those of LoRA adapters, and all others (a task head that is trained with them).

    Raises:
        OptionError: If none is trainable.
    """
    counts = adapters.count_trainable(model)
    adapter, other = counts["adapter"], counts["other"]
    if adapter + other == 0:
        raise OptionError("the model has no trainable parameter. Attach an adapter first.")
    return adapter, other


class _Run:
    """One call of :func:`train`: the Trainer, its callback, and how they fill the outcome."""

    def __init__(
        self,
        model: Any,
        data: TaskData,
        settings: TrainSettings,
        folder: Path,
        outcome: TrainOutcome,
        on_progress: Progress | None,
        capacity: Capacity | None,
    ) -> None:
        self.capacity = capacity
        self.finish: Callable[[Any], None] | None = None
        self.model, self.data, self.settings = model, data, settings
        self.folder, self.outcome = folder, outcome
        self.device = next(model.parameters()).device
        self.autocast = autocast_dtype(settings.precision, self.device)
        self.steps = Steps(
            settings.steps, settings.eval_every, self.evaluate, on_progress, settings.binding()
        )

    def find_checkpoint(self, tell: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to resume from, with the losses before it restored."""
        checkpoint = last_complete(self.folder)
        if checkpoint is None:
            tell("no whole checkpoint to resume from; starting at step 0")
            return None
        state = read_state(checkpoint, self.settings.binding())
        if self.capacity is None:
            check_same_adapter(self.model, checkpoint)
        self.steps.restore(state)
        self.outcome.resumed_from = self.steps.done
        tell(f"resuming at step {self.steps.done} of {self.settings.steps}")
        return checkpoint

    def train(self, checkpoint: Path | None, stopper: Stopper) -> None:
        """Run the Trainer to the end, then evaluate."""
        self.steps.stopper = stopper
        callbacks: list[Any] = [*([self.capacity] if self.capacity else []), self.steps]
        trainer = RunTrainer(
            model=self.model,
            args=trainer_arguments(
                self.settings, self.folder, self.device, size_of(self.data.train)
            ),
            train_dataset=self.data.train,
            data_collator=self.data.collate,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.steps, trainer.sampler = self.steps, sampler_for(self.data, self.settings)
        # Where a model takes any keyword, the Trainer believes that its loss is already a mean over
        # the whole step; classification losses are not, and accumulation would multiply them
        # (transformers 5.23). Micro-batches are of one size here, so a mean of means is exact.
        trainer.model_accepts_loss_kwargs = False
        if self.capacity is not None:
            prepare_trainer(trainer)
        self.steps.begin()
        if checkpoint is not None and self.steps.done >= self.settings.steps:
            trainer.load(checkpoint)  # the Trainer would take one more step
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.steps.done < self.settings.steps:
            self.outcome.status = "interrupted"
            return
        stopper.release()
        if self.finish is not None:
            self.finish(self.model)
        found = self.steps.final_evaluation()
        self.outcome.metrics, self.outcome.items = found.metrics, found.outcomes

    def evaluate(self) -> Evaluation:
        """Return an evaluation on the evaluation split, computed as training computes."""
        settings = self.settings
        size = settings.eval_batch_size or settings.batch_size
        # Writing answers out takes long; on the way the loss says enough.
        last = self.steps.done >= settings.steps
        return evaluate(
            self.model, self.data, size, settings.max_eval_batches, self.autocast, answers=last
        )

    def close(self) -> None:
        """Copy what the callback gathered into the outcome."""
        steps, outcome = self.steps, self.outcome
        outcome.steps, outcome.losses, outcome.eval_losses = (
            steps.done,
            steps.losses,
            steps.eval_losses,
        )
        outcome.train_seconds, outcome.eval_seconds = steps.train_seconds(), steps.eval_seconds
        outcome.tokens, outcome.positions = steps.tokens, steps.positions
        if self.capacity is not None:
            outcome.ranks_over_time = self.capacity.ranks_over_time
            outcome.decisions = self.capacity.decisions
            outcome.neurons = self.capacity.neurons
            # Methods that prune begin with more than the plan's ranks.
            began = self.capacity.start_parameters
            outcome.adapter_parameters = began or outcome.adapter_parameters
            self.capacity.close()

    def how_to_resume(self) -> str:
        """Return the message of an interrupted run."""
        saved = last_complete(self.folder)
        at = f"interrupted at step {self.steps.done} of {self.settings.steps}"
        if saved is None:
            return f"{at}; no checkpoint was written. Start again."
        step = saved.name.rpartition("-")[2]
        return f"{at}; a checkpoint of step {step} is kept. Go on with --resume."

    def explain(self, error: BaseException) -> str:
        """Return what happened and what to do, for an error in training."""
        if isinstance(error, GradrankError):
            return str(error)
        if is_out_of_memory(error):
            return (
                f"out of memory on {self.device} at step {self.steps.done + 1}. Lower batch_size "
                f"(now {self.settings.batch_size}) and raise accumulation instead, lower "
                f"max_length, or switch gradient_checkpointing on."
            )
        raise error
