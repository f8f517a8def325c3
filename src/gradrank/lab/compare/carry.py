"""One run of a grid, from a fresh model to its record."""

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from gradrank.core.budget import Budget
from gradrank.core.errors import GradrankError
from gradrank.core.plan import Plan
from gradrank.core.shortage import is_out_of_memory
from gradrank.evidence.metrics import METRICS
from gradrank.lab.arms import head_modules, head_options, head_parameters, moving, shared_scale
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.registry import create_baseline, is_baseline
from gradrank.lab.compare.bench import Bench, Loaded, warmed
from gradrank.lab.compare.grid import STABILITY, TUNE, GridRun
from gradrank.lab.compare.recipe import Recipe
from gradrank.lab.encode import size_of
from gradrank.lab.environment import environment
from gradrank.lab.epochs import options_in_steps
from gradrank.lab.measured import narrow
from gradrank.lab.train import TrainOutcome, train
from gradrank.methods.registry import METHODS, create
from gradrank.record import RunRecord
from gradrank.session import allocate, apply
from gradrank.signals.facts import find_targets, model_facts
from gradrank.signals.layers import base_parameters

Progress = Callable[[int, int, float, float], None]
_HEADLESS = {"lm", "instruct"}


def carry_out(
    run: GridRun, recipe: Recipe, bench: Bench, on_progress: Progress | None = None
) -> RunRecord:
    """Carry out one run.

    Args:
        run: The run.
        recipe: The comparison it belongs to.
        bench: What runs share.
        on_progress: Told of every step, see :func:`gradrank.lab.train.train`.

    Returns:
        Its record: finished, or failed with the reason in ``comparison["message"]``. Only what
        says that the program itself is wrong is raised.
    """
    record = blank(run, recipe)
    try:
        _fill(record, run, bench, on_progress)
    except Exception as error:
        if not isinstance(error, GradrankError) and not is_out_of_memory(error):
            raise
        record.status = "failed"
        record.comparison = {**(record.comparison or {}), "message": str(error) or repr(error)}
    return record


def blank(run: GridRun, recipe: Recipe) -> RunRecord:
    """Return the record of a run before anything happened.

    Args:
        run: The run.
        recipe: The comparison it belongs to.

    Returns:
        The record, which says where the run stands in the comparison.
    """
    return RunRecord(
        name=run.label,
        kind="plan" if run.phase == STABILITY else "train",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=run.to_dict(),
        seeds={"run": run.seed, "calibration": _calibration_seed(run)},
        comparison=_about(run, recipe),
    )


def _fill(record: RunRecord, run: GridRun, bench: Bench, on_progress: Progress | None) -> None:
    config = run.config
    fresh = bench.load(config, "validation" if run.phase == TUNE else "test", run.seed)
    record.environment = environment(fresh.device, next(fresh.loaded.model.parameters()).dtype)
    metric = fresh.data.metric
    record.comparison = {
        **(record.comparison or {}),
        "metric": metric,
        "higher_is_better": METRICS[metric].higher_is_better,
        "data": dict(fresh.data.describe),
    }
    arm = _Arm(run, bench, fresh)
    started = time.perf_counter()
    built = arm.build()
    calibration = time.perf_counter() - started - arm.saved_seconds
    record.ranks_over_time = [[0, dict(built.ranks)]] if built.ranks else []
    record.cost = {"calibration_seconds": calibration, "measure_seconds": arm.measure_seconds}
    record.comparison |= {"notes": list(built.notes), "matched": arm.matched}
    record.comparison |= {"budget_parameters": arm.budget, "scaling": arm.scaling()}
    record.comparison |= {"reliability": arm.reliability}
    if run.phase == STABILITY:
        record.trainable_parameters = {"peak": arm.planned, "final": arm.planned, "other": 0}
        return
    settings = config.settings(run.seed, size_of(fresh.data.train))
    head = sum(p.numel() for p in head_parameters(built.model) if p.requires_grad)
    trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    scratch = Path(tempfile.mkdtemp(prefix="gradrank-"))
    try:
        outcome = train(
            built.model,
            fresh.data,
            settings,
            scratch,
            on_progress=on_progress,
            capacity=built.capacity,
            finish=built.finish,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _note(record, outcome, arm.plan, trainable - head, head)


def _note(
    record: RunRecord, outcome: TrainOutcome, plan: Plan | None, adapter: int, head: int
) -> None:
    """Write what training gave into the record."""
    record.status = "finished" if outcome.status == "finished" else outcome.status
    if outcome.status != "finished":
        record.comparison = {**(record.comparison or {}), "message": outcome.message}
    record.losses = {"train": outcome.losses, "eval": outcome.eval_losses}
    record.metrics, record.items = dict(outcome.metrics), outcome.items
    about = record.comparison or {}
    record.comparison = {**about, "data": {**about.get("data", {}), **_looked_at(outcome.items)}}
    record.cost = {
        **record.cost,
        "train_seconds": outcome.train_seconds,
        "eval_seconds": outcome.eval_seconds,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "peak_memory_bytes": outcome.peak_memory_bytes,
    }
    used = [adapter, *(d["parameters"] for d in outcome.decisions)]
    if plan is not None:
        # What is trainable includes stored zeros and masked rows; the run's own count does not.
        used[0] = outcome.adapter_parameters
    record.trainable_parameters = {"peak": max(used), "final": used[-1], "other": head}
    if outcome.ranks_over_time:
        # The way there is a single run's business; a grid keeps its two ends.
        record.ranks_over_time = [outcome.ranks_over_time[0], outcome.ranks_over_time[-1]]
    record.decisions = [
        {key: decision[key] for key in ("step", "parameters") if key in decision}
        for decision in outcome.decisions
    ]


def _looked_at(items: Mapping[str, Any] | None) -> dict[str, int]:
    """Say how much of the split was evaluated, which may be a draw from it."""
    if not items:
        return {}
    return {
        "evaluated_examples": len(items["nll"]),
        "evaluated_items": sum(items.get("count") or [1] * len(items["nll"])),
    }


class _Arm:
    """A method or a baseline on its way to a model that can be trained."""

    def __init__(self, run: GridRun, bench: Bench, fresh: Loaded) -> None:
        self.run, self.bench, self.fresh = run, bench, fresh
        self.model = fresh.loaded.model
        self.targets = find_targets(self.model, run.config.targets)
        budget = Budget.parse(run.budget)
        self.budget = budget.resolve(self.targets, base_parameters(self.model))
        self.steps = run.config.settings(run.seed, size_of(fresh.data.train)).steps
        self.matched, self.plan, self.planned = True, None, 0
        self.measure_seconds = self.saved_seconds = 0.0
        self.reliability: dict[str, Any] = {}
        step = run.config.batch_size * run.config.accumulate
        self.options = options_in_steps(run.options, size_of(fresh.data.train), step)

    def build(self) -> Built:
        """Return the model to train."""
        if not is_baseline(self.run.method):
            return self._method()
        baseline = create_baseline(self.run.method, self.options)
        self.matched = bool(baseline.matched)
        torch.manual_seed(self.run.seed)
        return baseline.build(self.setting())

    def setting(self) -> Setting:
        """Return what a baseline may use."""
        config, seed = self.run.config, self.run.seed
        calibration = _calibration_seed(self.run)

        def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
            return self.fresh.batches(count, config.batch_size, calibration)

        head = self.fresh.loaded.head
        return Setting(
            model=self.model,
            targets=self.targets,
            budget=self.budget,
            scaling=self.scaling(),
            steps=self.steps,
            seed=seed,
            batches=batches,
            uniform=self._uniform,
            peft_options=self._peft_options(),
            head=() if head in _HEADLESS else head_modules(self.model),
            warmed=lambda: warmed(self.fresh, config, calibration),
        )

    def scaling(self) -> float:
        """Return the scale that all arms of the run's budget share."""
        config, base = self.run.config, base_parameters(self.model)
        return shared_scale(self.targets, self.run.budget, base, config.scaling, config.lora_alpha)

    def _uniform(self, parameters: int) -> Plan:
        facts = model_facts(self.model, self.run.config.targets)
        return allocate(self.targets, "uniform", parameters, provenance=facts)

    def _seeded(self) -> dict[str, Any]:
        """Options with the run's seed for what a method draws: controls are drawn anew."""
        draws = any(item.name == "seed" for item in fields(METHODS[self.run.method]))
        return {"seed": self.run.seed, **self.options} if draws else self.options

    def _peft_options(self) -> dict[str, Any]:
        loaded = self.fresh.loaded
        return {
            **head_options(loaded.model, loaded.head),
            "lora_dropout": self.run.config.lora_dropout,
        }

    def _method(self) -> Built:
        method = create(self.run.method, self._seeded())
        scaling = self.scaling()
        if method.signals():
            seed, started = _calibration_seed(self.run), time.perf_counter()
            whole = self.bench.measurement(self.fresh, self.run.config, method.signals(), seed)
            # Whoever measured, every method that needs it is charged for the pass.
            self.measure_seconds = float(whole.info.get("seconds") or 0.0)
            self.saved_seconds = time.perf_counter() - started - self.measure_seconds
            self.plan = allocate(narrow(whole, method.signals()), method, self.run.budget)
        else:
            facts = model_facts(self.model, self.run.config.targets)
            self.plan = allocate(self.targets, method, self.run.budget, provenance=facts)
        self.planned = self.plan.parameters
        found = self.plan.reliability or {}
        known = ("split_half", "within_shape", "saturation", "recommendation")
        self.reliability = {key: found[key] for key in known if key in found}
        if self.run.phase == STABILITY:
            return Built(self.model, ranks=self.plan.ranks)
        capacity = moving(self.plan, self.steps, self.run.seed)
        torch.manual_seed(self.run.seed)
        model = apply(self.plan, self.model, scaling=scaling, **self._peft_options())
        return Built(model, capacity, self.plan.ranks)


def _calibration_seed(run: GridRun) -> int:
    fixed = run.config.calibration_seed
    # How far calibrations agree is asked by drawing them anew.
    return run.seed if fixed is None or run.phase == STABILITY else fixed


def _about(run: GridRun, recipe: Recipe) -> dict[str, Any]:
    return {
        "run": run.id,
        "recipe": recipe.name,
        "about": recipe.about,
        "source": recipe.source,
        "reference": recipe.reference,
        "phase": run.phase,
        "task": run.task,
        "method": run.label,
        "budget": run.budget,
        "seed": run.seed,
        "lr": run.config.lr,
        "metric": None,
        "higher_is_better": None,
        "matched": True,
        "notes": [],
        "message": "",
    }
