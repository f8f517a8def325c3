"""The heavy part of ``gradrank plan``."""

from pathlib import Path
from typing import Any

import torch

from gradrank.cli import runfile
from gradrank.cli.console import Console
from gradrank.cli.lengths import in_steps, rehearsed
from gradrank.cli.planning import make_plan
from gradrank.cli.prepare import prepare
from gradrank.cli.settings import Settings
from gradrank.cli.training import make_record, now, plan_record
from gradrank.core.errors import OptionError
from gradrank.core.folders import new_folder
from gradrank.core.plan import Plan
from gradrank.lab.encode import size_of
from gradrank.lab.environment import environment
from gradrank.lab.measured import narrow
from gradrank.methods.registry import create
from gradrank.record import RunRecord
from gradrank.report import write as write_report
from gradrank.session import allocate
from gradrank.signals.measurement import Measurement


def measured_plan(settings: Settings, console: Console) -> tuple[Plan, Path]:
    """Load, measure, allocate, write.

    Args:
        settings: What was asked for.
        console: Shows how far it is.

    Returns:
        The plan and its folder.
    """
    created = now()
    # a wrong option is told before a model is loaded
    create(settings.method, rehearsed(settings).options)
    prepared = prepare(settings, console)
    asked, settings = settings, in_steps(settings, size_of(prepared.data.train))
    plan, measurement = make_plan(prepared, settings, console, all_signals=True)
    record = make_record(prepared, plan, settings, None, measurement, created)
    _write(settings.chosen_out, asked, plan, measurement, record)
    return plan, settings.chosen_out


def plan_again(settings: Settings, console: Console) -> tuple[Plan, Path | None]:
    """Allocate from a measurement that was taken before.

    Args:
        settings: What was asked for.
        console: Told what is loaded.

    Returns:
        The plan, and its folder if one was asked for.

    Raises:
        OptionError: If an option is given in epochs.
    """
    created = now()
    if rehearsed(settings).options != (settings.options or {}):
        raise OptionError(
            "an option is given in epochs, and --from reads no data that would tell how many steps "
            "an epoch has. Give it in steps."
        )
    method: Any = create(settings.method, settings.options)
    measurement = Measurement.load(str(settings.measured))
    console.say(
        f"measurement: {measurement.batches} batches of {measurement.info.get('model')}, "
        f"{len(measurement.targets)} targets"
    )
    plan = allocate(narrow(measurement, method.signals()), method, settings.budget)
    if settings.out is None:
        return plan, None
    about = environment(torch.device("cpu"), torch.float64)
    record = plan_record(plan, settings, measurement, created, about)
    _write(settings.out, settings, plan, measurement, record)
    return plan, settings.out


def _write(
    out: Path,
    settings: Settings,
    plan: Plan,
    measurement: Measurement | None,
    record: RunRecord,
) -> None:
    with new_folder(out, settings.overwrite) as folder:
        plan.save(folder / "plan.json")
        if measurement is not None:
            measurement.save(folder / "measurement.safetensors")
        record.save(folder / "record.json")
        write_report([record], folder / "report.html")
        runfile.write(folder / "config.yaml", settings.replay(), "plan")
