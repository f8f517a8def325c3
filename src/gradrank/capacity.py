"""One run of a dynamic method on a live model: observe, decide, operate, remember."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gradrank.adapters import sidecar
from gradrank.adapters.reserve import refit, restart
from gradrank.adapters.surgery import EditReport, edit, parameters_in_use
from gradrank.adapters.view import LoraSite, adapter_name, lora_sites, lora_targets
from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError, DataError, OptionError, SurgeryError
from gradrank.core.targets import Target
from gradrank.methods.course import (
    Course,
    Decision,
    DirectionCourse,
    DynamicMethod,
    NeuronCourse,
)
from gradrank.ops.four_bit import keep_quantised_layout
from gradrank.ops.sketch import seed_of
from gradrank.ready import check_ready, check_surplus
from gradrank.record import finite
from gradrank.signals.distributed import bytes_exchanged, is_distributed
from gradrank.signals.layers import base_parameters, unwrapped
from gradrank.signals.parts import under
from gradrank.signals.replay import LossFunction
from gradrank.watch.choose import watch_for
from gradrank.watch.protocol import Watch


class CapacityRun:
    """What :class:`gradrank.Controller` and :class:`gradrank.CapacityCallback` share.

    It keeps no time of its own: it is told the step.

    Attributes:
        course: The method's course.
        budget: Parameters that may be in use at any moment; of methods that prune, in the end.
        start_parameters: Adapter parameters in use when the run began.
        step: Last step that ended.
        ranks_over_time: ``[step, {target: rank}]``, the ranks at the start first.
        decisions: One entry per decision, as :class:`gradrank.RunRecord` keeps them.
        neurons: Of methods that split neurons: the partitions and what they rest on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        method: DynamicMethod,
        budget: "str | int | Budget",
        total_steps: int,
        adapter: str | None = None,
        seed: int = 0,
        loss_function: LossFunction | None = None,
        resuming: bool = False,
        targets: tuple[Target, ...] | None = None,
    ) -> None:
        """Check that everything the run will need can be done; change nothing.

        Args:
            model: The PEFT model, as it is trained. Its 4-bit layers are kept trainable through
                (:mod:`gradrank.ops.four_bit`).
            optimizer: Its optimizer.
            method: The dynamic method.
            budget: Budget in parameters.
            total_steps: Optimizer steps of the run.
            adapter: Name of the adapter, if several are active.
            seed: Seed of sketches, of points on the path and of new directions.
            loss_function: ``loss_function(model, batch)``, for methods with passes of their own
                on models that return no loss.
            resuming: Whether the adapter has the ranks of a checkpoint already.
            targets: What the adapter sat on when the run began, where a checkpoint may have lost
                some of it; None: what it sits on now.
        """
        self._model, self._optimizer = model, optimizer
        self._method, self._seed = method, seed
        self._adapter = adapter_name(model, adapter)
        targets = targets or lora_targets(model, self._adapter)
        self.budget = resolve(model, targets, budget)
        self.course: Course = method.course(targets, self.budget, total_steps)
        self.course.schedule.check(f"method '{method.name}'")
        self._targets = targets
        check_ready(
            model, optimizer, self._adapter, self.course, method.name, self.budget, resuming
        )
        self.start_parameters = self.parameters
        if not resuming:
            one = sum(target.cost for target in targets)
            check_surplus(self.course, method.name, self.start_parameters, self.budget, one)
        keep_quantised_layout(model)
        self._watch: Watch = watch_for(
            self.course, model, optimizer, targets, self._adapter, seed, loss_function
        )
        self.step = 0
        self.ranks_over_time: list[Any] = [[0, self.ranks]]
        self.decisions: list[dict[str, Any]] = []
        self.neurons: dict[str, Any] | None = None
        # Where the count stood when the last decision had been taken.
        self._exchanged = bytes_exchanged()

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks in use, by target name, in model order."""
        sites = self._sites()
        return {t.name: sites[t.name].rank if t.name in sites else 0 for t in self._targets}

    @property
    def parameters(self) -> int:
        """Adapter parameters in use."""
        return parameters_in_use(self._sites())

    def before_step(self, step: int) -> None:
        """Get ready for a step that begins.

        Args:
            step: The step, from 1.
        """
        self._watch.before_step(step)

    def after_step(self, step: int) -> EditReport | None:
        """Take in a step that ended, and move capacity if a decision falls due.

        Args:
            step: The step, from 1; its optimizer step is done.

        Returns:
            What was moved, if a decision was taken.
        """
        self._watch.after_step(step)
        self.step = step
        report = self._decide(step) if self.course.schedule.decides(step) else None
        self.before_step(step + 1)
        return report

    def excess(self) -> str:
        """Return by how much the adapter is above the budget, or an empty text."""
        used = self.parameters
        if used <= self.budget:
            return ""
        what = "split" if isinstance(self.course, NeuronCourse) else "last pruning"
        return (
            f"the adapter has {used:,} parameters, more than the budget of {self.budget:,}: it is "
            f"that of a step before the {what}, which falls due after step "
            f"{self.course.schedule.decisions[-1]}. Train to the end, or take the last checkpoint."
        )

    def close(self) -> None:
        """Remove all hooks; safe to call twice."""
        self._watch.close()

    def _sites(self) -> dict[str, LoraSite]:
        return lora_sites(self._model, self._adapter)

    def _decide(self, step: int) -> EditReport:
        started = time.perf_counter()
        allowed = self.course.allowed(step, self.start_parameters)
        decision, edits = self._watch.decide(self.ranks, allowed)
        report = edit(
            self._model,
            edits,
            self._optimizer,
            adapter=self._adapter,
            seed=seed_of(self._seed, "step", step),
        )
        self._watch.decided(decision)
        self.neurons = self._watch.evidence(decision) or self.neurons
        if report.parameters[1] > allowed:
            raise BudgetError(
                f"step {step}: {report.parameters[1]:,} parameters are in use, more than the "
                f"{allowed:,} that are allowed; method '{self._method.name}' overspent."
            )
        course, last = self.course, step == self.course.schedule.decisions[-1]
        if last and isinstance(course, DirectionCourse) and course.restarts:
            seed = seed_of(self._seed, "restart")
            restart(self._model, self._optimizer, self._adapter, seed, course.init)
        self._note(step, decision, report, allowed, time.perf_counter() - started)
        return report

    def _note(
        self, step: int, decision: Decision, report: EditReport, allowed: int, seconds: float
    ) -> None:
        changed = [name for name, (old, new) in report.ranks.items() if old != new]
        if changed:
            self.ranks_over_time.append([step, self.ranks])
        before, self._exchanged = self._exchanged, bytes_exchanged()
        self.decisions.append(
            {
                "step": step,
                "parameters": report.parameters[1],
                "budget": allowed,
                "moved": report.moved,
                "changed": len(changed),
                "seconds": seconds,
                "bytes_exchanged": self._exchanged - before,
                "left_out": self._watch.left_out,
                **decision.facts,
                **{key: dict(column) for key, column in decision.details.items()},
            }
        )

    def save(self, path: Path, write: bool = True) -> None:
        """Write the sidecar of a checkpoint.

        Args:
            path: The file.
            write: Whether this process writes; the others take part in gathering.
        """
        tensors = {f"course/{key}": value for key, value in self.course.state().items()}
        tensors |= self._watch.state()
        formed = sidecar.formed_tensors(unwrapped(self._model), self._adapter)
        tensors |= {f"formed/{key}": value for key, value in formed.items()}
        if write:
            sidecar.write(path, finite(self._facts()), tensors)

    def restore(self, path: Path) -> None:
        """Take up the sidecar of a checkpoint; the adapter's ranks and weights must be loaded.

        Args:
            path: The file.

        Raises:
            DataError: If it is damaged; OptionError and SurgeryError, if it is of another run.
        """
        facts, tensors = sidecar.read(path)
        try:
            self._take(facts, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"'{path.name}' is damaged: {error!r}.") from error

    def refit(self, path: Path) -> None:
        """Give the model the ranks of a checkpoint, so that its weights can be loaded.

        Args:
            path: The checkpoint's sidecar.

        Raises:
            DataError: If it belongs to another model, or is damaged.
        """
        facts = sidecar.read(path)[0]
        found: Any = facts.get("ranks")
        ranks: dict[str, Any] = found if isinstance(found, dict) else {}
        partitions = sidecar.partitions_in(facts, path)
        known = set(ranks) == {target.name for target in self._targets}
        if not known or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise DataError(
                f"'{path.name}' does not hold a rank for each of this model's targets "
                f"({len(self._targets)}): it is damaged, or belongs to another model."
            )
        self._watch.pause()
        refit(self._model, ranks, self._optimizer, self._adapter, partitions)

    def _take(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        mine = self._facts()
        changed = [key for key in _BINDING if facts.get(key) != finite(mine[key])]
        if changed:
            listed = ", ".join(f"{k} {facts.get(k)!r} -> {finite(mine[k])!r}" for k in changed[:3])
            raise OptionError(
                f"the checkpoint was made with other settings: {listed}. Resume with the same ones."
            )
        sidecar.load_formed(unwrapped(self._model), self._adapter, under(tensors, "formed/"))
        if facts["ranks"] != self.ranks:
            raise SurgeryError(
                "the model does not have the checkpoint's ranks. Call "
                "gradrank.prepare_trainer(trainer) before trainer.train(resume_from_checkpoint=...)"
                "; in a plain loop call controller.restore(folder)."
            )
        for name, site in self._sites().items():
            site.layer.scaling[self._adapter] = facts["scaling"][name]
        self.course.restore(under(tensors, "course/"))
        self._watch.restore(tensors)
        self.start_parameters = facts["start_parameters"]
        if type(facts["step"]) is not int:
            raise TypeError(f"step {facts['step']!r}")
        self.step = facts["step"]
        self.ranks_over_time, self.decisions = facts["ranks_over_time"], facts["decisions"]
        self._exchanged = bytes_exchanged() - facts.get("bytes_since_decision", 0)
        self.neurons = facts.get("neurons")

    def _facts(self) -> dict[str, Any]:
        known: Any = self._method
        return {
            "method": self._method.name,
            "options": {f.name: getattr(known, f.name) for f in dataclasses.fields(known)},
            "budget": self.budget,
            "total_steps": self.course.schedule.total_steps,
            "seed": self._seed,
            "fixed_shape": any(site.masked for site in self._sites().values()),
            "processes": dist.get_world_size() if is_distributed() else 1,
            "step": self.step,
            "start_parameters": self.start_parameters,
            "ranks": self.ranks,
            "partitions": {
                name: site.partition.to_dict()
                for name, site in self._sites().items()
                if site.partition is not None
            },
            "neurons": self.neurons,
            "scaling": {name: site.scaling for name, site in self._sites().items()},
            "ranks_over_time": self.ranks_over_time,
            "decisions": self.decisions,
            "bytes_since_decision": bytes_exchanged() - self._exchanged,
        }


_BINDING = ("method", "options", "budget", "total_steps", "seed", "fixed_shape", "processes")


def resolve(model: nn.Module, targets: tuple[Target, ...], budget: "str | int | Budget") -> int:
    """Return a budget in parameters, for the targets that a model's adapter sits on.

    Args:
        model: The PEFT model.
        targets: The targets.
        budget: The budget.

    Returns:
        Parameters.
    """
    return Budget.parse(budget).resolve(targets, base_parameters(unwrapped(model)))
