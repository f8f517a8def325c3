"""``gradrank export``: an adapter in the form that others load."""

from pathlib import Path
from typing import Any

import click

from gradrank.cli.console import Console
from gradrank.cli.folders import EXPORT_FILES, check_out
from gradrank.cli.options import COMMON, HEADS, extra, flags
from gradrank.cli.settings import needed
from gradrank.cli.verb import Verb

EXAMPLES = """\
gradrank export my-run --target merged --out my-model
gradrank export ./some-adapter --model ./its-base-model --target peft --out my-adapter"""
TARGETS = ("peft", "merged")


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("adapter", type=click.Path(path_type=Path))
@extra(
    "Export",
    "--target",
    type=click.Choice(TARGETS),
    default="peft",
    help="peft: a stock PEFT adapter. merged: the whole model with the updates added in.",
)
@extra(
    "Export",
    "--model",
    metavar="NAME",
    help="The base model; default: the one that the run or the adapter names.",
)
@extra("Export", "--head", type=click.Choice(HEADS), help="Only if the adapter does not tell.")
@flags("trust_remote_code", "device", "dtype", "out", "overwrite", *COMMON)
def command(adapter: Path, as_json: bool, quiet: bool, **values: Any) -> None:
    """Write an adapter for others to load, after checking that its logits are those trained.

    ADAPTER is the folder of a run, or any PEFT LoRA adapter saved as safetensors.
    """
    console = Console(as_json, quiet)
    out = needed(values["out"])
    check_out(out, values["overwrite"], EXPORT_FILES)
    with console.working():
        from gradrank.cli.source import find_source

        source = find_source(adapter, values["model"], values["head"])
        from gradrank.cli.export_run import run

        done = run(source, values["target"], out, values, console)
    checked_on = "random pictures" if source.head == "image" else "real token sequences"
    console.show(
        f"written: {out} ({done.bytes / 1e6:.1f} MB, target {done.target})",
        f"check:   logits differ by at most {done.difference:.3g} on {checked_on} "
        f"(allowed: {done.tolerance:.3g})",
    )
    console.result(
        {
            "out": str(out),
            "target": done.target,
            "difference": done.difference,
            "tolerance": done.tolerance,
            "bytes": done.bytes,
        }
    )
