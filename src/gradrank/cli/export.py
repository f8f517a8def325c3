"""``gradrank export``: an adapter in the form that others load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gradrank.cli.console import Console
from gradrank.cli.folders import EXPORT_FILES, check_out
from gradrank.cli.options import COMMON, HEADS, extra, flags
from gradrank.cli.settings import needed
from gradrank.cli.verb import Verb
from gradrank.core.errors import OptionError

EXAMPLES = """\
gradrank export my-run --target vllm --out my-adapter
gradrank export ./some-adapter --model ./its-base-model --target llama.cpp --out for-llama-cpp
gradrank export my-run --budget uniform:4 --out smaller
gradrank export run-a run-b --weight 0.7 --weight 0.3 --rank 16 --out both
gradrank export my-run --target merged --save-dtype bfloat16 --out my-model"""
TARGETS = ("peft", "vllm", "sglang", "llama.cpp", "merged")
DTYPES = ("float32", "float16", "bfloat16")


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path),
                metavar="ADAPTER...")  # fmt: skip
@extra(
    "Export",
    "--target",
    type=click.Choice(TARGETS),
    default="peft",
    help="peft: a stock PEFT adapter. vllm, sglang, llama.cpp: what these servers load rightly. "
    "merged: the whole model with the updates added in.",
)
@extra(
    "Export",
    "--model",
    metavar="NAME",
    help="The base model; default: the one that the run or the adapter names.",
)
@extra("Export", "--head", type=click.Choice(HEADS), help="Only if the adapter does not tell.")
@extra(
    "Export",
    "--save-dtype",
    type=click.Choice(DTYPES),
    help="Type of the numbers that are written; default: as trained.",
)
@extra(
    "Export",
    "--padding",
    type=click.Choice(("none", "groups", "all")),
    help="Equal ranks by components of zeros: nowhere, within q/k/v and gate/up, or everywhere. "
    "Default: what the target needs.",
)
@extra(
    "Smaller adapters and sums",
    "--budget",
    metavar="BUDGET",
    help="Re-allocate the ranks of the trained adapter by its singular values: 200000, uniform:4 "
    "or 0.5% parameters.",
)
@extra(
    "Smaller adapters and sums",
    "--rank",
    type=click.IntRange(min=1),
    help="Cut every update to this rank.",
)
@extra(
    "Smaller adapters and sums",
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Several adapters of one base model are added up, 1 each; or say one weight for each.",
)
@extra(
    "Export",
    "--requantise",
    is_flag=True,
    default=False,
    help="For --target merged on a quantised base: write codes again, and tell the rounding.",
)
@flags("trust_remote_code", "device", "dtype", "out", "overwrite", *COMMON)
def command(adapters: tuple[Path, ...], as_json: bool, quiet: bool, **values: Any) -> None:
    """Write an adapter for others to load, after checking that its logits are those trained.

    ADAPTER is the folder of a run, or any PEFT LoRA or AdaLoRA adapter saved as safetensors.
    Several are added up first.
    """
    console = Console(as_json, quiet)
    out = needed(values["out"])
    _check(adapters, values)
    check_out(out, values["overwrite"], EXPORT_FILES)
    with console.working():
        from gradrank.cli.source import find_source

        sources = [find_source(path, values["model"], values["head"]) for path in adapters]
        from gradrank.cli.export_run import run

        done, summed = run(sources, out, values, console)
    console.show(*_lines(done, out, sources[0].head, summed, len(sources)))
    console.result(_result(done, out, summed))


def _check(adapters: tuple[Path, ...], values: Mapping[str, Any]) -> None:
    weights = values["weights"]
    if weights and len(weights) != len(adapters):
        raise OptionError(
            f"the numbers of adapters ({len(adapters)}) and of weights ({len(weights)}) differ. "
            "Give one --weight for each adapter, in the same order, or none."
        )
    if values["budget"] is not None and values["rank"] is not None:
        raise OptionError("--budget and --rank were both given. Give one of them.")
    if values["padding"] is not None and values["target"] == "merged":
        raise OptionError("--padding does not go with --target merged, which writes no adapter.")


def _lines(done: Any, out: Path, head: str, summed: float | None, count: int) -> list[str]:
    checked_on = "random pictures" if head == "image" else "real token sequences"
    size = f"{done.bytes / 1e6:.2f} MB, adapter before: {done.bytes_before / 1e6:.2f} MB"
    lines = [f"written: {out} (target {done.target}; {size})"]
    if summed is not None:
        lines.append(
            f"sum:     logits differ by at most {summed:.3g} from those of the {count} adapters "
            "added up one by one"
        )
    if done.losses is not None:
        lines += [f"smaller: {line}" for line in done.losses.lines()]
        lines.append(
            f"         logits change by at most {done.change:.3g}, where the whole adapter changes "
            f"them by {done.effect:.3g}"
        )
    if done.ranks:
        least, most = min(done.ranks.values()), max(done.ranks.values())
        ranks = f"rank {least}" if least == most else f"ranks {least} to {most}"
        lines.append(f"ranks:   {ranks} in {len(done.ranks)} modules")
    lines.append(
        f"check:   logits differ by at most {done.difference:.3g} on {checked_on} (allowed: "
        f"{done.tolerance:.3g}; the adapter changes them by {done.effect:.3g})"
    )
    if done.ranks:
        lines.append(f"         every update is within {done.error:.2g} of its norm")
    lines += [f"note:    {line}" for line in done.notes]
    lines += [f"use:     {line}" for line in done.advice]
    return lines


def _result(done: Any, out: Path, summed: float | None) -> dict[str, Any]:
    return {
        "out": str(out),
        "target": done.target,
        "difference": done.difference,
        "tolerance": done.tolerance,
        "effect": done.effect,
        "error": done.error,
        "bytes": done.bytes,
        "bytes_before": done.bytes_before,
        "ranks": dict(done.ranks),
        "sum_difference": summed,
        "losses": None if done.losses is None else done.losses.to_dict(),
        "change": done.change,
        "rounding": {
            name: {"weight": own.weight, "update": own.update}
            for name, own in done.rounding.items()
        },
        "notes": list(done.notes),
        "advice": list(done.advice),
    }
