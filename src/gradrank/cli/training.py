"""Train a plan, export the adapter, and record the run, as ``train`` and ``demo`` do it."""

import datetime
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradrank.cli import runfile
from gradrank.cli.console import Console
from gradrank.cli.exits import RunFailedError
from gradrank.cli.prepare import Prepared
from gradrank.cli.settings import Settings
from gradrank.core.folders import new_folder
from gradrank.core.plan import Plan
from gradrank.lab.arms import head_options, moving
from gradrank.lab.train import TrainOutcome, TrainSettings, train
from gradrank.record import RunRecord
from gradrank.report import write as write_report
from gradrank.session import ExportReport, apply, export
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        record: Its record, whatever the outcome.
        outcome: What training gave.
        exported: The adapter's export; None if training did not finish.
    """

    record: RunRecord
    outcome: TrainOutcome
    exported: ExportReport | None


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_start(
    folder: Path, settings: Settings, plan: Plan, measurement: Measurement | None
) -> None:
    """Write what a run can be resumed and replayed from; the configuration last.

    Args:
        folder: The run's folder.
        settings: Its settings.
        plan: Its plan.
        measurement: What the plan rests on.
    """
    plan.save(folder / "plan.json", overwrite=True)
    if measurement is not None:
        measurement.save(folder / "measurement.safetensors", overwrite=True)
    runfile.write(folder / "config.yaml", settings.replay(), "train")


def carry_out(
    prepared: Prepared,
    plan: Plan,
    settings: Settings,
    folder: Path,
    console: Console,
    measurement: Measurement | None = None,
    resume: bool = False,
    label: str = "training",
    report: bool = True,
) -> Result:
    """Apply a plan, train, write the adapter, the record and the report.

    Args:
        prepared: Model (its modules are wrapped in place) and data.
        plan: The plan.
        settings: How to train.
        folder: The run's folder, with what :func:`write_start` wrote.
        console: Shows how far it is.
        measurement: What the plan rests on, for the record.
        resume: Go on from the newest checkpoint.
        label: Name in the progress display.
        report: Whether to draw the run's own report.

    Returns:
        The record (written, whatever the outcome), the outcome, and the export if it finished.
    """
    created = now()
    capacity = moving(plan, train_settings(settings).steps, settings.seed)
    loaded = prepared.loaded
    torch.manual_seed(settings.seed)
    options = {
        "lora_dropout": settings.lora_dropout or 0.0,
        **head_options(loaded.model, loaded.head),
    }
    model = apply(plan, loaded.model, settings.lora_alpha or 16, **options)
    with console.progress(label) as tell:
        outcome = train(
            model,
            prepared.data,
            train_settings(settings),
            folder,
            on_progress=lambda step, steps, loss, _left: tell(step, steps, f"loss {loss:.3f}"),
            resume=resume,
            say=console.say,
            capacity=capacity,
        )
    exported = None
    if outcome.status == "finished":
        console.say("exporting the adapter and comparing its logits")
        exported = _export(model, prepared, folder, overwrite=resume)
    record = make_record(prepared, plan, settings, outcome, measurement, created)
    record.save(folder / "record.json", overwrite=True)
    if report:
        write_report([record], folder / "report.html", overwrite=True)
    if outcome.status == "finished" and not settings.checkpoint_every:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Result(record, outcome, exported)


def _export(model: Any, prepared: Prepared, folder: Path, overwrite: bool) -> ExportReport:
    """Export with a check of the logits; whatever happens, training is not lost."""
    try:
        return export(
            model, folder / "adapter", inputs=prepared.check_inputs(), overwrite=overwrite
        )
    except BaseException as error:
        kept = folder / "adapter-unchecked"
        try:
            with new_folder(kept, overwrite=True) as place:
                model.save_pretrained(str(place))
        except OSError:
            raise error from None
        raise RunFailedError(
            f"training finished, but its export did not: {error or 'interrupted'} The adapter is "
            f"kept, unchecked, in '{kept}'."
        ) from error


def train_settings(settings: Settings) -> TrainSettings:
    """Return the lab's settings.

    Args:
        settings: What was asked for.

    Returns:
        The same in the lab's words.
    """
    known = {
        "steps": settings.steps,
        "lr": settings.lr,
        "schedule": settings.schedule,
        "warmup": settings.warmup,
        "weight_decay": settings.weight_decay,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "group_by_length": settings.group_by_length,
        "workers": settings.workers,
        "eval_every": settings.eval_every,
    }
    return TrainSettings(
        batch_size=settings.batch_size,
        accumulation=settings.accumulate,
        seed=settings.seed,
        max_eval_batches=settings.eval_batches,
        save_every=settings.checkpoint_every or 0,
        **{name: value for name, value in known.items() if value is not None},
    )


def make_record(
    prepared: Prepared,
    plan: Plan,
    settings: Settings,
    outcome: TrainOutcome | None,
    measurement: Measurement | None,
    created: str,
) -> RunRecord:
    """Return the record of a run.

    Args:
        prepared: Model and data.
        plan: The plan.
        settings: The settings.
        outcome: What training gave; None for a plan alone.
        measurement: What the plan rests on.
        created: When the run began.

    Returns:
        The record.
    """
    record = plan_record(plan, settings, measurement, created, prepared.environment())
    if outcome is None:
        return record
    record.kind, record.status = "train", outcome.status
    record.losses = {"train": outcome.losses, "eval": outcome.eval_losses}
    record.metrics = dict(outcome.metrics)
    record.cost = {
        **record.cost,
        "train_seconds": outcome.train_seconds,
        "eval_seconds": outcome.eval_seconds,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "positions": outcome.positions,
        "peak_memory_bytes": outcome.peak_memory_bytes,
    }
    record.decisions, record.neurons = outcome.decisions, outcome.neurons
    if outcome.ranks_over_time:
        record.ranks_over_time = outcome.ranks_over_time
    used = [outcome.adapter_parameters, *(d["parameters"] for d in outcome.decisions)]
    record.trainable_parameters = {
        "peak": max(used),
        "final": used[-1],
        "other": outcome.other_parameters,
    }
    return record


def plan_record(
    plan: Plan,
    settings: Settings,
    measurement: Measurement | None,
    created: str,
    environment: Mapping[str, Any],
) -> RunRecord:
    """Return the record of a plan.

    Args:
        plan: The plan.
        settings: The settings.
        measurement: What it rests on.
        created: When the run began.
        environment: What it ran on.

    Returns:
        The record.
    """
    record = RunRecord(name=plan.method, kind="plan", created=created)
    record.config, record.environment = settings.replay(), dict(environment)
    record.seeds = {"run": settings.seed, "calibration": settings.measuring_seed}
    record.plan = plan.to_dict()
    record.ranks_over_time = [[0, plan.ranks]]
    record.trainable_parameters = {"peak": plan.parameters, "final": plan.parameters, "other": 0}
    record.cost = {"measure_seconds": 0.0}
    if measurement is not None:
        record.measurement = measurement.summary(float(plan.options.get("energy") or 0.9))
        info = measurement.info
        record.cost = {
            "measure_seconds": float(info.get("seconds") or 0.0),
            "measure_peak_memory_bytes": int(info.get("peak_memory_bytes") or 0),
        }
    return record


def last_words(outcome: TrainOutcome, folder: Path) -> None:
    """Raise what an unfinished run has to say.

    Args:
        outcome: The outcome.
        folder: The run's folder.

    Raises:
        KeyboardInterrupt: If the run was interrupted.
        RunFailedError: If it failed.
    """
    if outcome.status == "interrupted":
        raise KeyboardInterrupt(f"{outcome.message} The run so far is in '{folder}'.")
    if outcome.status == "failed":
        raise RunFailedError(f"{outcome.message} The run up to there is recorded in '{folder}'.")
