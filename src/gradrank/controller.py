"""Capacity that moves in a plain training loop, or one driven by accelerate."""

import logging
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from gradrank.adapters import sidecar
from gradrank.adapters.optimizers import inner_optimizer
from gradrank.adapters.stores import is_zero
from gradrank.adapters.surgery import EditReport
from gradrank.capacity import CapacityRun
from gradrank.core.budget import Budget
from gradrank.core.errors import OptionError, SurgeryError
from gradrank.methods.course import NeuronCourse
from gradrank.methods.method import Method
from gradrank.signals.replay import LossFunction
from gradrank.start import dynamic_method


class Controller:
    """Moves LoRA capacity while a loop of your own trains.

    Call :meth:`step` after every ``optimizer.step()``, and :meth:`finish` at the end (or use it
    as a context manager). Calls between optimizer steps, as in gradient accumulation, are free.
    A loop that steps its optimizer twice without calling :meth:`step` is stopped with an error,
    and so is the end of a run in which nothing was ever decided; a controller that is abandoned
    in that state says so on stderr at the latest when the process ends.

    Example:
        ::

            controller = gr.Controller(model, optimizer, "gard-dynamic", "uniform:8", steps)
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                controller.step()
                optimizer.zero_grad()
            controller.finish()

    Attributes:
        run: What is measured, decided and done.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        method: "str | Method" = "gard-dynamic",
        budget: "str | int | Budget" = "uniform:8",
        total_steps: int = 0,
        *,
        options: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        seed: int = 0,
        loss_function: LossFunction | None = None,
    ) -> None:
        """Check everything and begin to observe.

        Args:
            model: The PEFT model; where several processes train, the wrapped model, after
                :func:`reserve`.
            optimizer: The optimizer that steps it (accelerate's wrapper is seen through).
            method: A dynamic method, or its name.
            budget: Parameters that may be in use at any moment.
            total_steps: Optimizer steps of the whole run.
            options: Options, when the method is given by name.
            adapter: Name of the adapter, if several are active.
            seed: Seed of sketches, of points on the path and of new directions.
            loss_function: ``loss_function(model, batch)`` for methods that repeat mini-batches
                (``igu``, ``igu-direction``) on models that return no loss; ``batch`` is what the
                model was called with.

        Raises:
            OptionError: If ``total_steps`` is missing, or the method is static.
        """
        if total_steps < 1:
            raise OptionError(
                f"total_steps is {total_steps}; a schedule needs the number of optimizer steps of "
                "the whole run."
            )
        chosen = dynamic_method(method, options)
        self.run = CapacityRun(
            model, optimizer, chosen, budget, total_steps, adapter, seed, loss_function
        )
        self._total = total_steps
        self._counts = _Counts()
        self._hook = self._hooked(inner_optimizer(optimizer))
        self._end = weakref.finalize(self, _complain, self.run, self._counts)
        self.run.before_step(1)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks in use, by target name."""
        return self.run.ranks

    def step(self) -> EditReport | None:
        """Take in what happened since the last call; move capacity if a decision falls due.

        Returns:
            What was moved, if a decision was taken.
        """
        self._counts.calls += 1
        if self._hook is None:
            self._counts.optimizer_steps += 1
        if self._counts.seen == self._counts.optimizer_steps:
            return None  # a micro-batch, or a step that a gradient scaler skipped
        self._counts.seen = self._counts.optimizer_steps
        report = self.run.after_step(self.run.step + 1)
        if self.run.step == self._total:
            self.finish()
        return report

    def finish(self) -> None:
        """End the run: remove all hooks, and raise if the controller did not do its work.

        A run that ended too early, with more parameters than the budget, is warned about.

        Raises:
            SurgeryError: If it was never stepped, or never decided anything; the message says
                what was missing.
        """
        self.close()
        problem = self.missing()
        if problem:
            raise SurgeryError(problem)
        if excess := self.run.excess():
            warnings.warn(excess, UserWarning, stacklevel=2)

    def close(self) -> None:
        """Remove all hooks; safe to call twice."""
        self._counts.closed = True
        if self._hook is not None:
            self._hook.remove()
        self.run.close()

    def missing(self) -> str:
        """Return what kept the controller from its work, or an empty text."""
        return _missing(self.run, self._counts)

    def save(self, folder: str | Path) -> None:
        """Write the controller's state into a checkpoint's folder, atomically.

        Args:
            folder: The folder.
        """
        self.run.save(Path(folder) / sidecar.FILE)

    def restore(self, folder: str | Path) -> None:
        """Take up a state; call it before the weights and the optimizer's state are loaded.

        The model gets the ranks of the checkpoint, so that both can be loaded.

        Args:
            folder: The folder that :meth:`save` wrote to.
        """
        path = Path(folder) / sidecar.FILE
        self.run.refit(path)
        self.run.restore(path)
        self.run.before_step(self.run.step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.close()

    def _hooked(self, optimizer: Any) -> Any:
        """Watch the optimizer's steps; DeepSpeed's takes several in one, so calls count there."""
        if is_zero(optimizer):
            return None
        return optimizer.register_step_post_hook(self._on_optimizer_step)

    def _on_optimizer_step(self, *_: Any) -> None:
        if self._counts.optimizer_steps > self._counts.seen:
            self.close()
            calls, steps = self._counts.calls, self._counts.optimizer_steps + 1
            raise SurgeryError(
                f"optimizer.step() ran twice and controller.step() did not ({calls} calls in "
                f"{steps} steps). Call controller.step() after every "
                "optimizer.step(), or controller.close() to stop moving capacity."
            )
        self._counts.optimizer_steps += 1


@dataclass
class _Counts:
    """What a controller has seen: its own calls, and steps of the optimizer."""

    calls: int = 0
    optimizer_steps: int = 0
    seen: int = 0
    closed: bool = False


def _missing(run: CapacityRun, counts: _Counts) -> str:
    if run.decisions:
        return ""
    due = run.course.schedule.decisions[0]
    if not counts.optimizer_steps:
        return (
            f"the controller never acted: its optimizer made no step ({counts.calls} calls of "
            "controller.step()). Pass the optimizer that trains the model, and call "
            "controller.step() after optimizer.step()."
        )
    if not counts.calls:
        return (
            "the controller was never stepped. Call controller.step() after every optimizer.step()."
        )
    lower = "initial_steps" if isinstance(run.course, NeuronCourse) else "interval or warmup"
    return (
        f"the controller never acted: the run ended after step {run.step}, and the first "
        f"decision falls due after step {due}. Lower {lower}, or train longer."
    )


def _complain(run: CapacityRun, counts: _Counts) -> None:
    """Say at the end of the process what an abandoned controller has left undone."""
    problem = "" if counts.closed else _missing(run, counts)
    if problem:
        logging.getLogger("gradrank").error("%s", problem)
