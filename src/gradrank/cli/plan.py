"""``gradrank plan``: measure and allocate, or allocate again from a measurement."""

from pathlib import Path
from typing import Any

import click

from gradrank.cli import runfile, settings
from gradrank.cli.console import Console
from gradrank.cli.folders import RUN_FILES, check_out, told_when_interrupted
from gradrank.cli.options import COMMON, DATA, MEASURING, METHOD, RUNNING, extra, flags
from gradrank.cli.verb import Verb
from gradrank.core.errors import DataError, OptionError

EXAMPLES = """\
gradrank plan --model tiny-llama --task tiny-lm --budget uniform:4 --out my-plan
gradrank plan --model ./my-model --data train.jsonl --head lm --budget 0.5% --out my-plan
gradrank plan --from my-plan/measurement.safetensors --budget 200000 --option energy=0.8
gradrank plan --model meta-llama/Meta-Llama-3-8B --dry-run --quantised 4 --max-length 2048
gradrank plan --model ./my-model --task NAME --batch-size 1 --max-memory 8GiB --out my-plan"""


# What a dry run looks at; all other flags of 'plan' are about data and files.
_DRY = frozenset(
    {
        "model", "head", "max_length", "method", "option", "budget", "targets", "batches",
        "batch_size", "accumulate", "checkpoint", "max_memory", "preset", "device", "dtype",
        "quantised", "tflops", "dry_run", "as_json", "quiet",
    }
)  # fmt: skip


@click.command(cls=Verb, examples=EXAMPLES)
@flags(*DATA, *METHOD)
@extra(
    "Method",
    "--from",
    "measured",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Allocate at once from this measurement.safetensors; no model is loaded.",
)
@flags(*MEASURING, *RUNNING)
@extra(
    "Dry run",
    "--dry-run",
    is_flag=True,
    default=False,
    show_default=False,
    help="Print parameters, memory and work from the model's configuration alone, and stop: no "
    "weights and no data are read.",
)
@extra(
    "Dry run",
    "--quantised",
    type=click.Choice(["4", "8"]),
    help="Bits of the base weights, for the estimate of a dry run.",
)
@extra(
    "Dry run",
    "--tflops",
    metavar="X",
    type=click.FloatRange(min=0, min_open=True),
    help="Throughput that your device really reaches, in 10^12 operations per second: a dry run "
    "then tells seconds.",
)
@flags(*COMMON)
@click.pass_context
def command(
    context: click.Context,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    quantised: str | None,
    tflops: float | None,
    **values: Any,
) -> None:
    """Measure gradients of a few mini-batches and decide which rank each module gets.

    Writes plan.json, measurement.safetensors, record.json, report.html and config.yaml into
    --out, all of them or none. With --dry-run it only says what that and training would take.
    """
    console = Console(as_json, quiet)
    chosen = settings.collect(context, values)
    if dry_run:
        _check_dry(context, chosen)
        with console.working():
            from gradrank.cli import plan_dry

            plan_dry.run(chosen, int(quantised) if quantised else None, tflops, console)
        return
    _check_wet(quantised, tflops)
    if unused := runfile.unused(context):
        console.say(f"not used by 'plan': {', '.join(unused)}")
    if values["measured"] is None:
        settings.check(chosen)
        check_out(chosen.chosen_out, chosen.overwrite)
    else:
        _check_again(context, chosen)
    with console.working(), told_when_interrupted(chosen.out):
        if values["measured"] is None:
            from gradrank.cli.plan_run import measured_plan

            plan, out = measured_plan(chosen, console)
        else:
            from gradrank.cli.plan_run import plan_again

            plan, out = plan_again(chosen, console)
    _tell(console, plan, out, again=values["measured"] is not None)


def _check_dry(context: click.Context, chosen: settings.Settings) -> None:
    """Refuse what ``--dry-run`` has no use for."""
    typed = settings.given(context, command_line=True)
    if "measured" in typed:
        raise OptionError(
            "--dry-run and --from do not go together: with --from everything has been measured "
            "already. Leave one of them out."
        )
    keys = {str(p.name): p.opts[0] for p in context.command.params if p.expose_value}
    useless = sorted(keys[name] for name in typed - _DRY if name in keys)
    if useless:
        raise OptionError(
            f"--dry-run reads no data and writes nothing: leave out {', '.join(useless)}."
        )
    settings.check_method(chosen.method)
    settings.check_budget(chosen.budget)
    settings.check_memory(chosen.max_memory)
    if not chosen.model:
        raise OptionError(
            "give a model with --model: a folder with its config.json, a hub name whose "
            "config.json is in the cache, or one whose shapes are built in (tiny-llama, ...)."
        )


def _check_wet(quantised: str | None, tflops: float | None) -> None:
    """Refuse what only ``--dry-run`` has a use for."""
    if quantised or tflops:
        raise OptionError(
            "--quantised and --tflops are about a dry run only. Add --dry-run, or leave them out."
        )


def _check_again(context: click.Context, chosen: settings.Settings) -> None:
    """Refuse what ``--from`` has no use for."""
    settings.check_method(chosen.method)
    settings.check_budget(chosen.budget)
    useless = settings.given(context, command_line=True) & {*DATA, *MEASURING, "targets"}
    if useless:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(useless))
        raise OptionError(f"--from loads no model and measures nothing: leave out {names}.")
    if not Path(str(chosen.measured)).is_file():
        what = "is a folder" if Path(str(chosen.measured)).is_dir() else "does not exist"
        raise DataError(
            f"--from: file '{chosen.measured}' {what}. Give the measurement.safetensors of an "
            "earlier 'gradrank plan'."
        )
    if chosen.out is not None:
        check_out(chosen.out, chosen.overwrite)


def _tell(console: Console, plan: Any, out: Path | None, again: bool) -> None:
    from gradrank.cli.tables import by_type, plan_lines

    targets = [planned.target for planned in plan.targets]
    console.show(by_type(targets, plan.ranks, plan.partitions), *plan_lines(plan))
    if out is None:
        console.show("nothing was written; give --out DIR to keep this plan")
    else:
        console.show(
            f"written: {out} ({', '.join(name for name in RUN_FILES if (out / name).exists())})",
            f"next:    gradrank show {out / 'plan.json'}",
        )
        if not again:
            console.show(
                f"         gradrank train --plan {out / 'plan.json'} "
                f"--config {out / 'config.yaml'} --out DIR"
            )
    console.result({"out": None if out is None else str(out), "plan": plan.to_dict()})
