"""The Trainer with a step-by-step record: losses, time, tokens, interruption, checkpoints."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from gradrank.core.errors import MeasurementError, OutputError
from gradrank.core.files import explain_os_error
from gradrank.lab.checkpoints import seal
from gradrank.lab.evaluate import Evaluation
from gradrank.lab.stopping import Stopper


class DivergenceError(MeasurementError):
    """A loss that is not finite."""


class Steps(TrainerCallback):
    """Record every step.

    Attributes:
        losses: ``[step, loss]`` of every step.
        eval_losses: ``[step, loss]`` of every evaluation.
        eval_seconds: Wall time of all evaluations.
        tokens: Tokens (for pictures: examples) so far.
        positions: Tokens so far, those of padding included.
        done: Steps done.
        stopper: Asked after each step whether to stop.
    """

    def __init__(
        self,
        total: int,
        eval_every: int,
        evaluate: Callable[[], Evaluation],
        on_progress: Callable[[int, int, float, float], None] | None,
        settings: dict[str, Any],
    ) -> None:
        """Prepare.

        Args:
            total: Steps of the whole run.
            eval_every: Steps between evaluations; 0: none but the last.
            evaluate: Evaluates the model.
            on_progress: Called after each step.
            settings: Written into each checkpoint.
        """
        self.total, self.eval_every, self.evaluate = total, eval_every, evaluate
        self.on_progress, self.settings = on_progress, settings
        self.losses: list[list[float]] = []
        self.eval_losses: list[list[float]] = []
        self.eval_seconds, self.tokens, self.positions, self.done = 0.0, 0, 0, 0
        self.stopper: Stopper | None = None
        self._loss: torch.Tensor | None = None
        self._tokens: torch.Tensor | int = 0
        self._final: Evaluation | None = None
        self._before = self._paused = self._started = 0.0
        self._first = 0

    def begin(self) -> None:
        """Start the clock."""
        self._started, self._paused, self._first = time.perf_counter(), 0.0, self.done

    def train_seconds(self) -> float:
        """Return the wall time of training so far, without evaluations."""
        if not self._started:
            return self._before
        now = time.perf_counter()
        return self._before + now - self._started - self._paused

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds.

        Args:
            state: What :meth:`state` returned then.
        """
        self.losses, self.eval_losses = state["losses"], state["eval_losses"]
        self.done, self.tokens = state["step"], state["tokens"]
        self.positions = state.get("positions", self.tokens)
        self._before, self.eval_seconds = state["train_seconds"], state["eval_seconds"]

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        return {
            "settings": self.settings,
            "step": self.done,
            "losses": self.losses,
            "eval_losses": self.eval_losses,
            "tokens": self.tokens,
            "positions": self.positions,
            "train_seconds": self.train_seconds(),
            "eval_seconds": self.eval_seconds,
        }

    def add(self, loss: torch.Tensor, tokens: torch.Tensor | int, positions: int) -> None:
        """Add one micro-batch to the current step; nothing waits for the device.

        Args:
            loss: Its share of the step's loss.
            tokens: Its tokens.
            positions: Its tokens, those of padding included.
        """
        self._loss = loss if self._loss is None else self._loss + loss
        self._tokens = self._tokens + tokens
        self.positions += positions

    def _read(self) -> float:
        """Return the step's loss and count its tokens: the one time that the host waits."""
        loss, tokens = self._loss, self._tokens
        self._loss, self._tokens = None, 0
        if loss is None:
            return float("nan")
        if isinstance(tokens, int):
            self.tokens += tokens
            return float(loss)
        # A step has fewer tokens than the 2^24 up to which float32 counts.
        found = torch.stack([loss.detach().float(), tokens.to(loss.device).float()]).tolist()
        self.tokens += int(found[1])
        return found[0]

    def final_evaluation(self) -> Evaluation:
        """Return the evaluation after the last step; it is done once only."""
        last = self.eval_losses[-1][0] if self.eval_losses else -1
        if self._final is None or last != self.done:
            if last == self.done:  # known from the checkpoint, but without its metrics
                self.eval_losses.pop()
            self._final = self._evaluate()
        return self._final

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        **kwargs: Any,
    ) -> None:
        """Read the step's loss; stop before a loss that is not finite reaches the weights.

        Args:
            args: The Trainer's arguments.
            state: Its state; the step is not counted yet.
            control: Its flow of control.
            kwargs: Model, optimizer and the like.

        Raises:
            DivergenceError: If the loss is NaN or infinite.
        """
        loss = self._read()
        step = state.global_step + 1
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the loss is {loss} at step {step} of {self.total}: training diverged. Lower the "
                f"learning rate (now {self.settings.get('lr')}) or raise warmup; with float16 try "
                f"bfloat16."
            )
        self.losses.append([step, loss])

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        **kwargs: Any,
    ) -> None:
        """Evaluate if it is time, tell the progress, and stop if asked to."""
        self.done = state.global_step
        if self.eval_every and self.done % self.eval_every == 0:
            self._final = self._evaluate()
        if self.on_progress is not None:
            pace = (self.train_seconds() - self._before) / max(self.done - self._first, 1)
            left = pace * (self.total - self.done)
            self.on_progress(self.done, self.total, self.losses[-1][1], left)
        if self.stopper is not None and self.stopper.asked and self.done < self.total:
            control.should_training_stop = control.should_save = True

    def on_save(
        self,
        args: Any,
        state: Any,
        control: Any,
        **kwargs: Any,
    ) -> None:
        """Mark the checkpoint that was just written as whole."""
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.state())

    def _evaluate(self) -> Evaluation:
        start = time.perf_counter()
        found = self.evaluate()
        spent = time.perf_counter() - start
        self._paused += spent
        self.eval_seconds += spent
        self.eval_losses.append([self.done, found.loss])
        return found


class RunTrainer(Trainer):
    """The Trainer, telling :class:`Steps` the loss of each micro-batch.

    Attributes:
        steps: The callback to tell.
        sampler: Deals out the training examples; None: at random.
    """

    steps: Steps
    sampler: Sampler | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute gradients of one micro-batch.

        Args:
            model: The (wrapped) model.
            inputs: The micro-batch.
            num_items_in_batch: Predicted items of the whole step.

        Returns:
            Its share of the step's loss.
        """
        mask = inputs.get("attention_mask")
        positions = inputs.get("input_ids", inputs["labels"]).numel()
        tokens = positions if mask is None else mask.sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.steps.add(loss, tokens, positions)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def load(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint.

        Args:
            checkpoint: A whole checkpoint.
        """
        self._load_from_checkpoint(str(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(str(self.args.output_dir))
            cause = error if isinstance(error, OSError) else OSError(str(error))
            raise OutputError(
                f"checkpoint of step {self.state.global_step}: {explain_os_error(cause, folder)}"
            ) from error
