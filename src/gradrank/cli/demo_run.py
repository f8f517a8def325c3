"""The heavy part of ``gradrank demo``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradrank.cli.console import Console
from gradrank.cli.demo_folder import check_demo_folder, mark
from gradrank.cli.exits import RunFailedError
from gradrank.cli.planning import plan_without_data, rehearse, take_measurement
from gradrank.cli.prepare import Prepared, load_model, prepare, read
from gradrank.cli.settings import Settings
from gradrank.cli.tables import plan_lines, table
from gradrank.cli.training import carry_out, train_settings, write_start
from gradrank.core.folders import new_folder
from gradrank.core.plan import Plan
from gradrank.lab.evaluate import evaluate
from gradrank.lab.measured import narrow
from gradrank.lab.settings import autocast_dtype
from gradrank.methods.registry import create
from gradrank.record import RunRecord
from gradrank.report import write as write_report
from gradrank.session import allocate
from gradrank.signals.measurement import Measurement

Planned = tuple[Plan, Measurement | None]
CLOSING = (
    "So short a run shows the machinery at work and proves nothing about which method is better."
)


def run(base: Settings, names: Sequence[str], console: Console) -> None:
    """Measure once, train every method from the same start, report.

    Args:
        base: Settings that all methods share.
        names: The methods, the control first.
        console: Shows how far it is.
    """
    started = time.monotonic()
    prepared = prepare(base, console)
    before = _untrained(prepared, base, console)
    plans = make_plans(prepared, names, base, console)
    out = base.chosen_out
    with new_folder(out, overwrite=True) as folder:
        records = _train_all(prepared, plans, base, folder, console)
        write_report(records, folder / "report.html", title=_title(prepared, base))
        mark(folder)
        check_demo_folder(out)  # again, as late as possible: minutes have passed
    _tell(console, records, before, out, time.monotonic() - started)


def make_plans(
    prepared: Prepared, names: Sequence[str], base: Settings, console: Console
) -> dict[str, Planned]:
    """Allocate by every method from one measurement.

    Args:
        prepared: Model and data.
        names: The methods.
        base: Settings that all methods share.
        console: Shows how far it is.

    Returns:
        Plan and measurement by method; each plan is the one that the method alone would make.
    """
    methods: dict[str, Any] = {name: create(name) for name in names}
    rehearse(prepared, list(methods.values()), base)
    signals = list(dict.fromkeys(s for method in methods.values() for s in method.signals()))
    shared = take_measurement(prepared, signals, base, console) if signals else None
    plans: dict[str, Planned] = {}
    for name, method in methods.items():
        if shared is not None and method.signals():
            part = narrow(shared, method.signals())
            plans[name] = allocate(part, method, base.budget), shared
        else:
            plans[name] = plan_without_data(prepared, method, base), None
        console.say(f"plan {name}:")
        for line in plan_lines(plans[name][0]):
            console.say(f"  {line}")
    return plans


def _train_all(
    prepared: Prepared,
    plans: Mapping[str, Planned],
    base: Settings,
    folder: Path,
    console: Console,
) -> list[RunRecord]:
    records = []
    for name, (plan, measurement) in plans.items():
        settings = replace(base, method=name)
        if records:
            # A fresh copy for each, so that every method starts from the very same weights.
            examples = read(settings, console)
            prepared = replace(prepared, loaded=load_model(settings, examples, console))
        place = folder / name
        place.mkdir()
        write_start(place, settings, plan, measurement)
        result = carry_out(
            prepared,
            plan,
            settings,
            place,
            console,
            measurement,
            label=f"training {name}",
            report=False,
        )
        if result.outcome.status == "interrupted":
            raise KeyboardInterrupt("the demo left nothing behind; run it again.")
        if result.outcome.status == "failed":
            raise RunFailedError(f"method '{name}': {result.outcome.message}")
        records.append(result.record)
    return records


def _untrained(prepared: Prepared, base: Settings, console: Console) -> float:
    console.say("evaluating the model before training")
    chosen = train_settings(base)
    autocast = autocast_dtype(chosen.precision, prepared.device)
    found = evaluate(
        prepared.loaded.model, prepared.data, chosen.batch_size, chosen.max_eval_batches, autocast
    )
    console.say(f"evaluation loss before training: {found.loss:.4f}")
    return found.loss


def _title(prepared: Prepared, base: Settings) -> str:
    about = prepared.data.describe
    return f"Demo: {prepared.loaded.name} on {about['name']}, {base.steps} steps"


def _tell(
    console: Console, records: Sequence[RunRecord], before: float, out: Path, seconds: float
) -> None:
    rows = []
    control = records[0].metrics["eval_loss"]
    for record in records:
        loss, cost = record.metrics["eval_loss"], record.cost
        ranks = [rank for _, each in record.ranks_over_time for rank in each.values()]
        rows.append(
            (
                record.name,
                f"{record.trainable_parameters['final']:,}",
                str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}",
                f"{loss:.4f}",
                "" if record is records[0] else f"{loss - control:+.4f}",
                f"{cost.get('measure_seconds') or 0:.0f} s",
                f"{cost['train_seconds']:.0f} s",
            )
        )
    heads = (
        "method", "parameters", "ranks", "evaluation loss", f"against {records[0].name}",
        "measuring", "training",
    )  # fmt: skip
    measured = [record.name for record in records if record.measurement is not None]
    shared = f"; one measurement served {' and '.join(measured)}" if len(measured) > 1 else ""
    console.show(
        table("", heads, rows),
        f"evaluation loss before training: {before:.4f}; {seconds / 60:.1f} minutes in all{shared}",
        f"report:  {(out / 'report.html').resolve()}",
        f"next:    gradrank show {out / records[-1].name}",
        f"note:    {CLOSING}",
    )
    console.result(
        {
            "out": str(out),
            "report": str(out / "report.html"),
            "untrained_eval_loss": before,
            "seconds": seconds,
            "note": CLOSING,
            "runs": [
                {
                    "method": record.name,
                    "parameters": record.trainable_parameters["final"],
                    "metrics": dict(record.metrics),
                    "cost": dict(record.cost),
                }
                for record in records
            ],
        }
    )
