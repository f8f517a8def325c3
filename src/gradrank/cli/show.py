"""``gradrank show``: a plan or an adapter in the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gradrank.cli.console import Console
from gradrank.cli.options import COMMON, flags
from gradrank.cli.verb import Verb
from gradrank.core.errors import DataError
from gradrank.core.plan import Plan

EXAMPLES = """\
gradrank show my-plan/plan.json
gradrank show my-run/adapter --json"""


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("path", type=click.Path(path_type=Path))
@flags(*COMMON)
def command(path: Path, as_json: bool, quiet: bool) -> None:
    """Print a plan.json or an adapter folder: ranks, parameters, scales, budget, reliability.

    PATH is a plan.json, a folder with one (of 'plan' or 'train'), or a PEFT adapter folder. No
    model is loaded. For an adapter also the energy of its updates, and which engines would serve
    it rightly as it is.
    """
    console = Console(as_json, quiet)
    if (path / "adapter_config.json").is_file():
        _show_adapter(path, console)
        return
    _show_plan(Plan.load(_plan_file(path)), console)
    if (path / "adapter" / "adapter_config.json").is_file():
        console.show(f"adapter: gradrank show {path / 'adapter'}")


def _plan_file(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"'{path}' does not exist. Give a plan.json, a run or an adapter folder.")
    if not path.is_dir():
        return path
    if not (path / "plan.json").is_file():
        raise DataError(f"folder '{path}' holds neither a plan.json nor an adapter_config.json.")
    return path / "plan.json"


def _show_plan(plan: Plan, console: Console) -> None:
    from gradrank.cli.tables import by_type, partition_table, plan_lines, rank_maps
    from gradrank.report.text import clean

    targets = [planned.target for planned in plan.targets]
    options = ", ".join(f"{key}={value}" for key, value in plan.options.items())
    model = plan.provenance.get("model_spec") or plan.provenance.get("model_name")
    console.show(
        clean(f"method {plan.method} ({options or 'no options'}) on {model or 'an unnamed model'}"),
        *rank_maps(targets, plan.ranks, plan.partitions),
        *partition_table(plan),
        by_type(targets, plan.ranks, plan.partitions),
        *plan_lines(plan),
        f"scale: lora_alpha / {plan.reference_rank} for every target, whatever its rank",
    )
    console.result(
        {
            "kind": "plan",
            **plan.to_dict(),
            "ranks": plan.ranks,
            "partitions": {name: split.to_dict() for name, split in plan.partitions.items()},
            "slack": plan.slack,
        }
    )


def _show_adapter(path: Path, console: Console) -> None:
    from gradrank.cli.tables import by_type, maps, rank_maps
    from gradrank.report.text import clean
    from gradrank.serving.energy import energy
    from gradrank.serving.engines.registry import ENGINES
    from gradrank.serving.facts import describe
    from gradrank.serving.reading import read_adapter

    facts = describe(path)
    found = energy(read_adapter(path))
    whole = math.fsum(own.energy for own in found.values())
    ranks = {target.name: rank for target, rank in facts.ranks.items()}
    targets = list(facts.ranks)
    verdicts = {name: engine.judge(facts) for name, engine in ENGINES.items()}
    other = f" and {facts.other_parameters:,} of other modules" if facts.other_parameters else ""
    console.show(
        clean(f"adapter for {facts.base_model or 'an unnamed model'}"),
        *rank_maps(targets, ranks),
        *maps("energy, % of all updates,", targets, _shares(found, whole)),
        by_type(targets, ranks),
        f"{facts.parameters:,} adapter parameters{other} in {facts.dtype}",
        f"scale: {_scales(facts.scales)}",
        f"energy: {whole:.4g} (squared Frobenius norm of all updates); {_useful(found, ranks)}",
        *_verdicts(verdicts),
    )
    console.result(
        {
            "kind": "adapter",
            "base_model": facts.base_model,
            "parameters": facts.parameters,
            "other_parameters": facts.other_parameters,
            "dtype": facts.dtype,
            "ranks": ranks,
            "scales": dict(facts.scales),
            "energy": {
                name: {
                    "energy": own.energy,
                    "share": own.energy / whole if whole else 0.0,
                    "effective_rank": own.effective_rank,
                    "stable_rank": own.stable_rank,
                }
                for name, own in found.items()
            },
            "engines": {name: {"right": not why, "why": list(why)} for name, why in
                        verdicts.items()},
        }
    )  # fmt: skip


def _shares(found: Mapping[str, Any], whole: float) -> dict[str, str]:
    return {n: f"{100 * own.energy / whole:.1f}" if whole else "0" for n, own in found.items()}


def _useful(found: Mapping[str, Any], ranks: Mapping[str, int]) -> str:
    """Say how many of the directions that were paid for hold nine tenths of each update."""
    held = sum(own.effective_rank for own in found.values())
    return f"{held} of {sum(ranks.values())} directions hold 90 % of each update's"


def _verdicts(verdicts: Mapping[str, Sequence[str]]) -> list[str]:
    lines = ["as it is stored:"]
    for name, why in verdicts.items():
        lines.append(f"  {name:10} {'loads it rightly' if not why else 'NO: ' + why[0]}")
        lines += [f"  {'':10}     {reason}" for reason in why[1:]]
    if any(verdicts.values()):
        lines.append("  'gradrank export --target ENGINE' writes what an engine loads rightly")
    return lines


def _scales(scales: Mapping[str, Any]) -> str:
    values = sorted(set(scales.values()))
    if len(values) == 1:
        return f"{values[0]:g} for every target"
    return f"{values[0]:g} to {values[-1]:g}, {len(values)} different ones (see --json)"
