"""``gradrank demo``: the main job end to end, on what can be had without a hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gradrank.cli import settings
from gradrank.cli.console import Console
from gradrank.cli.demo_folder import check_demo_folder
from gradrank.cli.folders import told_when_interrupted
from gradrank.cli.options import COMMON, extra, flags
from gradrank.cli.verb import Verb

EXAMPLES = """\
gradrank demo
gradrank demo --steps 100 --methods uniform,gard,random --out longer-demo
gradrank demo --model tiny-llama --task tiny-lm --out tiny-demo"""
DEFAULTS: dict[str, Any] = {
    "model": "smollm2-135m",
    "task": "movie-review-lm",
    "max_length": 48,
    "budget": "uniform:4",
    "batches": 16,
    "batch_size": 8,
    "steps": 28,
    "lr": 2e-3,
    "lora_alpha": 8.0,
    "eval_batches": 10,
}


@click.command(cls=Verb, examples=EXAMPLES)
@flags("model", "task", "max_length", **DEFAULTS)
@extra(
    "Method",
    "--methods",
    metavar="NAMES",
    default="uniform,gard,waterfill",
    help="Methods to compare, with commas between; the first is the control.",
)
@flags("budget", "batches", "batch_size", "steps", "lr", "lora_alpha", "eval_batches", **DEFAULTS)
@flags("seed", "device", "dtype")
@extra(
    "Running",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("gradrank-demo"),
    help="Folder to write; an earlier demo there is replaced, anything else is not.",
)
@flags(*COMMON)
@click.pass_context
def command(
    context: click.Context, methods: str, as_json: bool, quiet: bool, **values: Any
) -> None:
    """Fine-tune a real language model three times at one budget, and draw the report.

    Model and text come from package registries, once; later demos start at once. One measurement
    serves all methods. So short a run shows the machinery at work and proves nothing.
    """
    console = Console(as_json, quiet)
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    base = settings.collect(context, values)
    for name in names or ("",):
        settings.check(replace(base, method=name))
    check_demo_folder(base.chosen_out)
    with console.working(), told_when_interrupted(base.out):
        from gradrank.cli.demo_run import run

        run(base, names, console)
