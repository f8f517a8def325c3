"""Drive PEFT's own AdaLoRA: one call per optimizer step, in a plain loop or under the Trainer.

Nobody else calls ``update_and_allocate``, neither PEFT nor the Trainer. What PEFT 0.21 leaves to
its caller:

- **When.** Scores need gradients: after ``optimizer.step``, before ``zero_grad``, once per
  optimizer step and not per micro-batch. Gradients set to zero instead of None would tie all
  scores at 0 and prune everything. A step that a gradient scaler skipped has infinite gradients,
  which would stay in the moving averages; it is counted here and not scored.
- **Counting.** Steps are counted from 1: steps done. Counted from 0, as some examples do, and with
  PEFT's default ``tfinal=0``, the last allocation is never reached and the model ends above its
  target.
- **Masks.** Pruning sets λ to 0 and nothing else: no tensor shrinks, so neither memory nor time
  falls, and before the final phase pruned directions come back with the next optimizer step, until
  the next allocation. A save in that phase drops what came back: it is another function than the
  model in memory. Two of PEFT's warnings are harmless here: about shards when a target that lost
  all directions is saved as empty tensors, and about ``rank_pattern`` when an adapter is loaded.
- **Resuming.** The moving averages are not saved, and a loaded adapter is resized so that its masks
  fit no more. A run that was cut off has to start again.
"""

import time
import warnings
from typing import Any

from peft import AdaLoraConfig
from torch import nn
from transformers import TrainerCallback

from gradrank.core.errors import OptionError, SurgeryError
from gradrank.lab.adalora import AdaLoraUse, adalora_layers, adalora_use, cost_of, tuner_of


class AdaLoraDriver:
    """Drives PEFT's AdaLoRA in a plain loop.

    Attributes:
        steps: Optimizer steps so far.
        peak: Most parameters in use so far, counted as :class:`gradrank.lab.adalora.AdaLoraUse`
            does.
        ranks_over_time: ``[step, {target: rank}]`` right after each allocation that changed
            something, the ranks at the start first.
        decisions: One entry per allocation, as :class:`gradrank.RunRecord` keeps it;
            ``rank_budget`` is PEFT's, in ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare.

        Args:
            model: A PEFT model with AdaLoRA.
        """
        self.model, self._tuner = model, tuner_of(model)
        self._layers = adalora_layers(model)
        self._costs = {name: cost_of(layer) for name, layer in self._layers.items()}
        self.steps, self.peak = 0, 0
        start = dict.fromkeys(self._layers, int(self.config.init_r))
        self.ranks_over_time: list[Any] = [[0, start]]
        self.decisions: list[dict[str, Any]] = []

    @property
    def config(self) -> AdaLoraConfig:
        """PEFT's configuration of the adapter."""
        return self._tuner.peft_config[self._tuner.trainable_adapter_name]

    @property
    def last_allocation(self) -> int:
        """The step after which PEFT prunes for the last time."""
        return int(self.config.total_step or 0) - int(self.config.tfinal)

    def step(self, skipped: bool = False) -> None:
        """Let PEFT score and prune; call it after ``optimizer.step``, before ``zero_grad``.

        Args:
            skipped: Whether a gradient scaler skipped the optimizer's step.

        Raises:
            SurgeryError: If gradients are gone, or if every direction was pruned.
        """
        self.steps += 1
        scores = self.steps < self.last_allocation
        if skipped and scores:
            return
        if scores:
            self._check_gradients()
        started = time.perf_counter()
        before = self.config.rank_pattern
        self._tuner.update_and_allocate(self.steps)
        pattern = self.config.rank_pattern
        if not self.peak:
            self.peak = adalora_use(self.model).total
        if pattern is not None and pattern is not before:
            self._record(pattern, time.perf_counter() - started)

    def missing(self) -> str:
        """Return what kept AdaLoRA from reaching its target, or an empty text."""
        if not self.steps:
            return (
                "PEFT's AdaLoRA was never driven, so that no rank was pruned. Call step() after "
                "every optimizer.step(), or give AdaLoraCallback to the Trainer."
            )
        if self.decisions and self.decisions[-1]["step"] == self.last_allocation:
            return ""
        return (
            f"PEFT's AdaLoRA did not reach its target: after {self.steps} steps "
            f"{len(self.decisions)} allocations were made, and the last one belongs to step "
            f"{self.last_allocation} of {self.config.total_step}. Train for total_steps steps."
        )

    def finish(self) -> AdaLoraUse:
        """End the run.

        Returns:
            What is in use.

        Raises:
            SurgeryError: If AdaLoRA was never driven, or not to its last allocation.
        """
        problem = self.missing()
        if problem:
            raise SurgeryError(problem)
        return adalora_use(self.model)

    def _record(self, pattern: dict[str, list[bool]], seconds: float) -> None:
        ranks = {name.rpartition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
        if not any(ranks.values()):
            raise SurgeryError(
                f"PEFT's AdaLoRA pruned every direction after step {self.steps}: all scores tie. "
                "Call step() before zero_grad(), and check that the loss has gradients."
            )
        old = self.ranks_over_time[-1][1]
        grown = {n: rank - old[n] for n, rank in ranks.items() if rank > old[n]}
        parameters = sum(rank * self._costs[name] for name, rank in ranks.items())
        self.peak = max(self.peak, parameters)
        self.decisions.append(
            {
                "step": self.steps,
                "parameters": parameters,
                "moved": sum(gain * self._costs[name] for name, gain in grown.items()),
                "changed": sum(rank != old[name] for name, rank in ranks.items()),
                "seconds": seconds,
                "rank_budget": int(self._tuner.rankallocator.budget_schedule(self.steps)[0]),
            }
        )
        if ranks != old:
            self.ranks_over_time.append([self.steps, ranks])

    def _check_gradients(self) -> None:
        """Say in words what PEFT would say as a TypeError.

        Raises:
            SurgeryError: If a factor has no gradient.
        """
        adapter = self._tuner.trainable_adapter_name
        for name, layer in self._layers.items():
            if any(f[adapter].grad is None for f in (layer.lora_A, layer.lora_B, layer.lora_E)):
                raise SurgeryError(
                    f"'{name}' has no gradient after step {self.steps}, and PEFT's AdaLoRA scores "
                    "by gradients. Call step() before zero_grad(), and leave out targets that "
                    "take no part in the loss."
                )


class AdaLoraCallback(TrainerCallback):
    """Drives PEFT's AdaLoRA under ``transformers.Trainer``.

    :func:`gradrank.lab.train.train` takes it in the place of a ``CapacityCallback``.

    Attributes:
        driver: The driver; None before training.
        final: What is in use at the end; None before.
    """

    def __init__(self) -> None:
        self.driver: AdaLoraDriver | None = None
        self.final: AdaLoraUse | None = None

    @property
    def ranks_over_time(self) -> list[Any]:
        """``[step, {target: rank}]``, the ranks at the start first."""
        return self.driver.ranks_over_time if self.driver else []

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """One entry per allocation."""
        return self.driver.decisions if self.driver else []

    @property
    def start_parameters(self) -> int | None:
        """Adapter parameters in use when the run began; None before."""
        return self.driver.peak if self.driver else None

    @property
    def neurons(self) -> None:
        """Nothing: AdaLoRA splits no neurons."""
        return None

    def close(self) -> None:
        """Nothing is hooked; there for those who treat all callbacks of a run alike."""

    def finish(self) -> AdaLoraUse:
        """Return what is in use at the end of training.

        Returns:
            Ranks and parameters.

        Raises:
            SurgeryError: If no Trainer used this callback, or it did not reach the last
                allocation.
        """
        if self.driver is None:
            raise SurgeryError(
                "AdaLoraCallback saw no training, so that no rank was pruned. Give it to the "
                "Trainer before trainer.train()."
            )
        return self.driver.finish()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what could not end well.

        Raises:
            SurgeryError: If the run was resumed.
            OptionError: If the Trainer's number of steps is not that of the configuration.
        """
        if state.global_step:
            raise SurgeryError(
                f"PEFT's AdaLoRA cannot go on at step {state.global_step}: its moving averages "
                "are not saved. Start again without resuming."
            )
        driver = AdaLoraDriver(kwargs["model"])
        if driver.config.total_step != state.max_steps:
            raise OptionError(
                f"AdaLoRA's schedule is for {driver.config.total_step} steps and the Trainer will "
                f"take {state.max_steps}. Give adalora_config total_steps={state.max_steps}."
            )
        self.driver = driver

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score and prune; the Trainer calls this between the optimizer's step and zero_grad."""
        driver = self._running()
        driver.step(bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that no step was missed.

        Raises:
            SurgeryError: If one was.
        """
        driver = self._running()
        if driver.steps != state.global_step:
            raise SurgeryError(
                f"AdaLoraCallback was called in {driver.steps} of {state.global_step} optimizer "
                "steps. Give it to the Trainer before training starts."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what is in use; fail if a whole run never came to the last allocation."""
        driver = self._running()
        if state.global_step >= state.max_steps:
            self.final = driver.finish()
            return
        self.final = adalora_use(driver.model)
        problem = driver.missing()
        if problem:
            warnings.warn(problem, UserWarning, stacklevel=2)

    def _running(self) -> AdaLoraDriver:
        if self.driver is None:
            raise SurgeryError("AdaLoraCallback saw no start of training. Give it to the Trainer.")
        return self.driver
