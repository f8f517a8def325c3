"""The heavy part of ``gradrank train``."""

from pathlib import Path

from gradrank.cli.console import Console
from gradrank.cli.folders import run_folder
from gradrank.cli.lengths import in_steps, rehearsed
from gradrank.cli.planning import make_plan
from gradrank.cli.prepare import Prepared, prepare
from gradrank.cli.settings import Settings
from gradrank.cli.tables import plan_lines
from gradrank.cli.training import carry_out, last_words, write_start
from gradrank.core.locks import held
from gradrank.core.plan import Plan
from gradrank.lab.encode import size_of
from gradrank.methods.registry import create
from gradrank.signals.measurement import Measurement


def run(settings: Settings, console: Console, resume: bool) -> None:
    """Start or resume a run.

    Args:
        settings: What was asked for.
        console: Shows how far it is.
        resume: Whether ``settings.out`` holds the run already.
    """
    if settings.plan is None:
        # a wrong option is told before a model is loaded
        create(settings.method, rehearsed(settings).options)
    prepared = prepare(settings, console)
    asked, settings = settings, in_steps(settings, size_of(prepared.data.train))
    if resume:
        _go_on(prepared, settings, console)
        return
    if settings.plan is not None:
        plan = Plan.load(settings.plan)
        measurement = _beside(Path(settings.plan), plan)
    else:
        plan, measurement = make_plan(prepared, settings, console)
    for line in plan_lines(plan):
        console.say(line)
    with run_folder(settings.chosen_out, settings.overwrite) as folder:
        write_start(folder, asked, plan, measurement)
        outcome = carry_out(prepared, plan, settings, folder, console, measurement).outcome
    last_words(outcome, folder)


def _beside(path: Path, plan: Plan) -> Measurement | None:
    """Return the measurement that a plan was made from, if it stands beside it."""
    file = path.with_name("measurement.safetensors")
    if not file.is_file() or not plan.provenance.get("batches"):
        return None
    measurement = Measurement.load(file)
    names = [target.name for target in measurement.targets]
    same = names == list(plan.ranks) and measurement.batches == plan.provenance["batches"]
    return measurement if same else None


def _go_on(prepared: Prepared, settings: Settings, console: Console) -> None:
    folder = settings.chosen_out
    plan = Plan.load(folder / "plan.json")
    path = folder / "measurement.safetensors"
    measurement = Measurement.load(path) if path.is_file() else None
    with held(folder):
        result = carry_out(prepared, plan, settings, folder, console, measurement, resume=True)
    last_words(result.outcome, folder)
