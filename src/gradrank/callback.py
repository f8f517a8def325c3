"""The one place beside the lab that knows transformers: dynamic capacity under its Trainer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from gradrank.adapters import sidecar
from gradrank.adapters.guard import wrapping
from gradrank.adapters.reserve import settle
from gradrank.adapters.view import (
    adapter_name,
    lora_sites,
    lora_targets,
)
from gradrank.capacity import CapacityRun
from gradrank.core import marker
from gradrank.core.budget import Budget
from gradrank.core.errors import SurgeryError
from gradrank.core.targets import Target
from gradrank.methods.method import Method
from gradrank.signals.distributed import is_distributed
from gradrank.signals.layers import unwrapped
from gradrank.signals.replay import LossFunction
from gradrank.start import dynamic_method, reserve, starts_wide


class CapacityCallback(TrainerCallback):
    """Moves LoRA capacity under ``transformers.Trainer`` and what is built on it (TRL).

    Pass it to the Trainer's constructor. Where several processes train, the layers then get
    fixed shapes with component masks before the model is wrapped, and their real ranks at the
    end. Every checkpoint gets a sidecar with the allocator's state;
    :func:`prepare_trainer` makes resuming and ``load_best_model_at_end`` work, and lets every
    decision appear in the Trainer's logs and in the trackers of ``report_to``.

    Attributes:
        run: What is measured, decided and done; None before training starts.
    """

    def __init__(
        self,
        method: "str | Method" = "gard-dynamic",
        budget: "str | int | Budget" = "uniform:8",
        *,
        options: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        seed: int = 0,
        loss_function: LossFunction | None = None,
    ) -> None:
        """Prepare.

        Args:
            method: A dynamic method, or its name.
            budget: Parameters that may be in use at any moment.
            options: Options, when the method is given by name.
            adapter: Name of the adapter, if several are active.
            seed: Seed of sketches, of points on the path and of new directions.
            loss_function: ``loss_function(model, batch)`` for methods that repeat mini-batches on
                models that return no loss.
        """
        self.method, self.budget = dynamic_method(method, options), Budget.parse(budget)
        self.loss_function = loss_function
        self.adapter, self.seed = adapter, seed
        self.run: CapacityRun | None = None
        self.resume_from: Path | None = None
        self._targets: tuple[Target, ...] | None = None
        self._trainer: Trainer | None = None

    @property
    def ranks_over_time(self) -> list[Any]:
        """``[step, {target: rank}]``, the ranks at the start first."""
        return self.run.ranks_over_time if self.run else self._saved("ranks_over_time") or []

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """One entry per decision."""
        return self.run.decisions if self.run else self._saved("decisions") or []

    @property
    def start_parameters(self) -> int | None:
        """Adapter parameters in use when the run began; None before."""
        return self.run.start_parameters if self.run else self._saved("start_parameters")

    @property
    def neurons(self) -> dict[str, Any] | None:
        """The partitions and what they rest on, of methods that split neurons."""
        return self.run.neurons if self.run else self._saved("neurons")

    def close(self) -> None:
        """Remove all hooks; safe to call twice."""
        if self.run is not None:
            self.run.close()

    def attach(self, model: nn.Module, args: Any) -> bool:
        """Give the adapter the shape that the method starts from; safe to call twice.

        Args:
            model: The PEFT model, not wrapped yet.
            args: The Trainer's arguments.

        Returns:
            Whether it has new parameters, which an optimizer made before does not hold.
        """
        adapter = adapter_name(model, self.adapter)
        fixed = _keeps_shapes(args)
        plain = all(site.form == "plain" for site in lora_sites(model, adapter).values())
        if plain or self._targets is None:
            # Now: a checkpoint that is resumed from may take adapters off for good.
            self._targets = lora_targets(model, adapter)
        widens = plain and (fixed or starts_wide(model, self.method, self.budget, adapter))
        if widens:
            reserve(model, self.method, self.budget, adapter=adapter, seed=self.seed, fixed=fixed)
        return widens

    def report_through(self, trainer: Trainer) -> None:
        """Let a Trainer log every decision, and so all that ``report_to`` names.

        Logged as ``gradrank/parameters``, ``gradrank/budget``, ``gradrank/moved`` (parameters given
        to targets that grew), ``gradrank/changed`` (targets), ``gradrank/smallest_rank``,
        ``gradrank/largest_rank``, ``gradrank/seconds``, and the method's own single numbers.

        Args:
            trainer: The Trainer that has this callback.
        """
        self._trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reserve ranks before the Trainer wraps the model."""
        model = kwargs.get("model")
        if model is not None:
            self.attach(model, args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check everything; refuse before the first step what could not be done later.

        Raises:
            SurgeryError: If the run was resumed without its allocator's state.
        """
        _refuse(args)
        self.run = CapacityRun(
            kwargs["model"],
            kwargs["optimizer"],
            self.method,
            self.budget,
            state.max_steps,
            self.adapter,
            self.seed,
            self.loss_function,
            resuming=self.resume_from is not None,
            targets=self._targets,
        )
        if self.resume_from is not None:
            self.run.restore(self.resume_from / sidecar.FILE)
            self.resume_from = None
        if self.run.step != state.global_step:
            raise SurgeryError(
                f"training goes on at step {state.global_step}, but the allocator's state is that "
                f"of step {self.run.step}. Call gradrank.prepare_trainer(trainer) before "
                "trainer.train(resume_from_checkpoint=...)."
            )
        if getattr(args, "save_total_limit", None) == 1:
            warnings.warn(
                "save_total_limit=1 deletes the last checkpoint before the new one is known to be "
                "whole; a run that dies in between cannot be resumed. Use 2.",
                UserWarning,
                stacklevel=2,
            )
        self.run.before_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the step; move capacity if a decision falls due."""
        if self._running().after_step(state.global_step) is not None:
            self._log(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the sidecar into the checkpoint, and mark it as whole."""
        folder = Path(args.output_dir) / f"{marker.PREFIX}{state.global_step}"
        write = bool(state.is_world_process_zero)
        self._running().save(folder / sidecar.FILE, write)
        if is_distributed():
            dist.barrier()  # every process has written its random state
        if write:
            marker.seal(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, make the layers plain again, and tell what was missing.

        Raises:
            SurgeryError: If no decision was ever taken though the run went to its end.
        """
        run = self._running()
        run.close()
        model = unwrapped(kwargs["model"])
        sites = lora_sites(model, adapter_name(model, self.adapter)).values()
        # Before plain factors hide that the zeros around the blocks of a partition are not in use.
        excess = run.excess()
        if any(site.form != "plain" for site in sites) and wrapping(model) != "FSDP":
            settle(model, self.adapter)
        if run.decisions:
            if excess:
                warnings.warn(excess, UserWarning, stacklevel=2)
            return
        due = run.course.schedule.decisions[0]
        problem = (
            f"no capacity was moved: training ended after step {state.global_step}, and the first "
            f"decision falls due after step {due}."
        )
        if state.global_step >= due:
            raise SurgeryError(f"{problem} No decision was taken; the callback was not called.")
        warnings.warn(f"{problem} The ranks are those of the start.", UserWarning, stacklevel=2)

    def _log(self, control: Any) -> None:
        """Send the numbers of the last decision where the Trainer's own logs go."""
        if self._trainer is None:
            return
        due = control.should_log
        # Not the method of a subclass: TRL's would empty its own averages into this entry.
        Trainer.log(self._trainer, _numbers(self._running()))
        control.should_log = due  # what the Trainer has to say about this step is still to come

    def _saved(self, key: str) -> Any:
        """What a finished checkpoint that was loaded knows, when nothing is left to train."""
        if self.resume_from is None:
            return None
        return sidecar.read(self.resume_from / sidecar.FILE)[0].get(key)

    def _running(self) -> CapacityRun:
        if self.run is None:
            raise SurgeryError(
                "CapacityCallback saw no start of training. Pass it to the Trainer before "
                "trainer.train()."
            )
        return self.run


def _numbers(run: CapacityRun) -> dict[str, float]:
    """The last decision as single numbers, which is what trackers take."""
    ranks = run.ranks.values()
    facts = {**run.decisions[-1], "smallest_rank": min(ranks), "largest_rank": max(ranks)}
    del facts["step"]
    return {f"gradrank/{key}": fact for key, fact in facts.items() if type(fact) in {int, float}}


def _refuse(args: Any) -> None:
    """Refuse ways to train in which hooks on the model see nothing.

    Raises:
        SurgeryError: If the Trainer will compile the model, or copy it to several GPUs.
    """
    if getattr(args, "torch_compile", False):
        raise SurgeryError(
            "torch_compile=True: a compiled model sees neither hooks that are set later nor, "
            "without compiling again, new shapes. Train without it, or use a static method."
        )
    if int(getattr(args, "n_gpu", 1) or 1) > 1 and int(getattr(args, "world_size", 1) or 1) == 1:
        raise SurgeryError(
            f"one process would copy the model to {args.n_gpu} GPUs at every step (DataParallel), "
            "and hooks see no copies. Start one process per GPU with torchrun or accelerate, or "
            "set CUDA_VISIBLE_DEVICES to one GPU."
        )


def _keeps_shapes(args: Any) -> bool:
    """Whether the Trainer will wrap the model for several processes, or for a sharded one."""
    several = int(getattr(args, "world_size", 1) or 1) > 1
    return several or bool(getattr(args, "deepspeed", None)) or bool(getattr(args, "fsdp", None))
