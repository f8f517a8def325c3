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
gradrank plan --from my-plan/measurement.safetensors --budget 200000 --option energy=0.8"""


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
@flags(*MEASURING, *RUNNING, *COMMON)
@click.pass_context
def command(context: click.Context, as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure gradients of a few mini-batches and decide which rank each module gets.

    Writes plan.json, measurement.safetensors, record.json, report.html and config.yaml into
    --out, all of them or none.
    """
    console = Console(as_json, quiet)
    chosen = settings.collect(context, values)
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


def _check_again(context: click.Context, chosen: settings.Settings) -> None:
    """Refuse what ``--from`` has no use for."""
    settings.check_method(chosen.method)
    settings.check_budget(chosen.budget)
    useless = settings.given(context, command_line=True) & {*DATA, *MEASURING, "targets"}
    if useless:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(useless))
        raise OptionError(f"--from loads no model and measures nothing: leave out {names}.")
    if not Path(str(chosen.measured)).is_file():
        raise DataError(f"--from: file '{chosen.measured}' does not exist.")
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
