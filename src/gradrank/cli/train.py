"""``gradrank train``: fine-tune with the capacity placed by a method or by a plan."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from gradrank.cli import runfile, settings
from gradrank.cli.console import Console
from gradrank.cli.folders import check_out, put_back, told_when_interrupted
from gradrank.cli.options import (
    COMMON,
    DATA,
    MEASURING,
    METHOD,
    RUNNING,
    TRAINING,
    extra,
    flags,
)
from gradrank.cli.settings import Settings
from gradrank.cli.verb import Verb
from gradrank.core.errors import OptionError, OutputError
from gradrank.core.plan import Plan

EXAMPLES = """\
gradrank train --model tiny-llama --task tiny-lm --method gard --budget uniform:4 --out my-run
gradrank train --plan my-plan/plan.json --config my-plan/config.yaml --steps 500 --out my-run
gradrank train --out my-run --resume"""

# What may change when a run is resumed, because it leaves the result alone.
_FREE = frozenset(
    {"out", "overwrite", "device", "eval_every", "eval_batches", "checkpoint_every", "workers"}
)


@click.command(cls=Verb, examples=EXAMPLES)
@flags(*DATA, *METHOD)
@extra(
    "Method",
    "--plan",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Train this plan.json instead of making one; --method and --budget are its own.",
)
@flags(*MEASURING, *TRAINING, *RUNNING)
@extra(
    "Running",
    "--resume",
    is_flag=True,
    default=False,
    show_default=False,
    help="Go on with the run in --out; its other settings are read from there.",
)
@flags(*COMMON)
@click.pass_context
def command(
    context: click.Context, as_json: bool, quiet: bool, resume: bool, **values: Any
) -> None:
    """Fine-tune a model with LoRA, its ranks placed by a method or by a plan.

    Writes a stock PEFT adapter, plan.json, record.json, report.html and config.yaml into --out.
    Ctrl-C stops after the current step and keeps a checkpoint; --resume goes on from it.
    """
    console = Console(as_json, quiet)
    chosen = settings.collect(context, values)
    if chosen.out is not None:
        put_back(chosen.out)
    if resume and (found := _saved(context, chosen)) is not None:
        chosen = found
        if _finished(chosen.chosen_out):
            console.say(f"the run in '{chosen.out}' is finished; there is nothing to resume")
            _tell(console, chosen.chosen_out)
            return
    else:
        resume = False
        settings.check(chosen)
        check_out(chosen.chosen_out, chosen.overwrite)
        _check_plan(context, chosen)
    with console.working(), told_when_interrupted(chosen.out):
        from gradrank.cli.train_run import run

        run(chosen, console, resume)
    _tell(console, chosen.chosen_out)


def _check_plan(context: click.Context, chosen: Settings) -> None:
    if chosen.plan is None:
        return
    clash = settings.given(context, command_line=True) & {*METHOD, "batches", "calibration_seed"}
    if clash:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(clash))
        raise OptionError(f"--plan decides what {names} would: leave out one or the other.")
    Plan.load(chosen.plan)


def _saved(context: click.Context, chosen: Settings) -> Settings | None:
    """Return the settings of the run in ``--out``, or None if there is no run yet."""
    out = chosen.chosen_out
    if chosen.overwrite:
        raise OptionError("--resume keeps what is there and --overwrite replaces it: choose one.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        click.echo(f"no run in '{out}' yet; starting a new one", err=True)
        return None
    if not (out / "config.yaml").is_file() or not (out / "plan.json").is_file():
        raise OutputError(
            f"'{out}' holds no run that can be resumed (config.yaml or plan.json is missing). "
            "Start again with --overwrite instead of --resume, or choose another --out."
        )
    path = out / "config.yaml"
    values = runfile.typed(context, runfile.read(path), f"config '{path}'")
    options = settings.parse_options(values.pop("option", ()))
    own = {item.name for item in fields(Settings)}
    kept = {name: value for name, value in values.items() if name in own}
    saved = Settings(**{**kept, "options": options})
    if saved.trust_remote_code and not chosen.trust_remote_code:
        raise OptionError(runfile.untyped("trust_remote_code", f"the run in '{out}'"))
    settings.check(saved)
    given = settings.given(context)
    names = {"options" if name == "option" else name for name in given}
    asked = {name: getattr(chosen, name) for name in names if hasattr(chosen, name)}
    changed = [
        f"{name} {getattr(saved, name)!r} -> {value!r}"
        for name, value in sorted(asked.items())
        if name not in _FREE and value != getattr(saved, name)
    ]
    if changed:
        raise OptionError(
            f"the run in '{out}' was started with other settings: {', '.join(changed)}. Leave "
            "them out to resume, or start again in another --out."
        )
    return replace(saved, **{name: value for name, value in asked.items() if name in _FREE})


def _finished(out: Path) -> bool:
    from gradrank.record import RunRecord

    record = out / "record.json"
    return record.is_file() and RunRecord.load(record).status == "finished"


def _tell(console: Console, out: Path) -> None:
    from gradrank.cli.tables import run_lines
    from gradrank.record import RunRecord

    record = RunRecord.load(out / "record.json")
    console.show(
        *run_lines(record),
        f"written: {out} (adapter, plan.json, record.json, report.html, config.yaml)",
        f"next:    gradrank show {out / 'adapter'}",
        f"         gradrank export {out} --target merged --out DIR",
    )
    console.result(
        {
            "out": str(out),
            "status": record.status,
            "method": record.name,
            "parameters": record.trainable_parameters.get("final"),
            "metrics": dict(record.metrics),
            "cost": dict(record.cost),
            "seeds": dict(record.seeds),
        }
    )
