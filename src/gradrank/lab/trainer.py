"""The Trainer with a step-by-step record: losses, time, tokens, interruption, checkpoints."""

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from gradrank.core.errors import MeasurementError, OutputError
from gradrank.core.files import explain_os_error
from gradrank.lab.checkpoints import seal
from gradrank.lab.evaluate import Evaluation


class DivergenceError(MeasurementError):
    """A loss that is not finite."""


class Stopper:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the current step.

    A context manager. The second one raises KeyboardInterrupt at once. Outside the main thread it
    does nothing, because only the main thread may set signal handlers.

    Attributes:
        asked: Whether stopping was asked for.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            tell: Receives one line when stopping was asked for.
        """
        self.tell, self.asked = tell, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over, and return this object."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Who ignores a signal (a worker of a grid, a job of nohup) means it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.tell("stopping after this step and saving; press Ctrl-C again to stop at once")


class Steps(TrainerCallback):
    """Record every step.

    Attributes:
        losses: ``[step, loss]`` of every step.
        eval_losses: ``[step, loss]`` of every evaluation.
        eval_seconds: Wall time of all evaluations.
        tokens: Tokens (for pictures: examples) so far.
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
        self.eval_seconds, self.tokens, self.done = 0.0, 0, 0
        self.stopper: Stopper | None = None
        self._loss: torch.Tensor | None = None
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
        self._before, self.eval_seconds = state["train_seconds"], state["eval_seconds"]

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        return {
            "settings": self.settings,
            "step": self.done,
            "losses": self.losses,
            "eval_losses": self.eval_losses,
            "tokens": self.tokens,
            "train_seconds": self.train_seconds(),
            "eval_seconds": self.eval_seconds,
        }

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        """Add one micro-batch to the current step.

        Args:
            loss: Its share of the step's loss.
            tokens: Its tokens.
        """
        self._loss = loss if self._loss is None else self._loss + loss
        self.tokens += tokens

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
        loss = float("nan") if self._loss is None else float(self._loss)
        self._loss = None
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
    """

    steps: Steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Compute gradients of one micro-batch.

        Args:
            model: The (wrapped) model.
            inputs: The micro-batch.
            num_items_in_batch: Predicted items of the whole step.

        Returns:
            Its share of the step's loss.
        """
        seen = inputs.get("attention_mask", inputs.get("input_ids"))
        tokens = inputs["labels"].numel() if seen is None else _count(seen, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.steps.add(loss, tokens)
        return loss

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


def _count(seen: torch.Tensor, inputs: Any) -> int:
    return int(seen.sum()) if "attention_mask" in inputs else seen.numel()
