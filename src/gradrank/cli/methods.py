"""``gradrank methods``: what there is, with source and options."""

from typing import Any

import click

from gradrank.cli.console import Console
from gradrank.cli.options import COMMON, extra, flags
from gradrank.cli.verb import Verb
from gradrank.core.errors import OptionError
from gradrank.lab.baselines.registry import PATHS, find_baseline
from gradrank.methods.registry import METHODS

EXAMPLES = """\
gradrank methods
gradrank methods gard
gradrank methods --presets
gradrank methods --json"""


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("name", required=False)
@extra(
    "Method",
    "--presets",
    is_flag=True,
    default=False,
    show_default=False,
    help="List the presets instead: settings of published experiments, for --preset.",
)
@flags(*COMMON)
def command(name: str | None, presets: bool, as_json: bool, quiet: bool) -> None:
    """List the methods with their sources; with NAME, one method with its options.

    Baselines are what 'gradrank compare' runs beside the methods; no other verb takes them.
    """
    console = Console(as_json, quiet)
    if name is not None and name not in PATHS and name not in METHODS:
        find_baseline(name)  # refuses the name with the nearest one of both kinds
    if presets:
        _show_presets(name, console)
        return
    with console.working():
        rows = [] if name in PATHS else describe(name)
        others = describe_baselines(name) if name is None or name in PATHS else []
    if name is None:
        _show_all(rows, console)
        _show_baselines(others, console)
        console.result({"methods": rows, "baselines": others})
    else:
        _show_one((rows or others)[0], console)
        console.result((rows or others)[0])


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """Return methods as plain data.

    Args:
        name: One of them; None: all.

    Returns:
        Per method ``name``, ``summary``, ``source``, ``signals`` and ``options``.
    """
    from gradrank.methods.method import describe_options
    from gradrank.signals.measure import MeanGradient

    rows = []
    for known in [name] if name else METHODS:
        method: Any = METHODS[known]
        signals = [
            "mean-gradient" if isinstance(signal, MeanGradient) else "spectrum"
            for signal in method().signals()
        ]
        rows.append(
            {
                "name": known,
                "summary": method.summary,
                "source": method.source,
                "signals": signals,
                "options": describe_options(method),
            }
        )
    return rows


def describe_baselines(name: str | None = None) -> list[dict[str, Any]]:
    """Return baselines as plain data.

    Args:
        name: One of them; None: all.

    Returns:
        Per baseline ``name``, ``summary``, ``source``, ``matched`` (whether it is held to a budget)
        and ``options``.
    """
    from gradrank.methods.method import describe_options

    found: list[Any] = [find_baseline(known) for known in ([name] if name else PATHS)]
    return [
        {
            "name": baseline.name,
            "summary": baseline.summary,
            "source": baseline.source,
            "matched": baseline.matched,
            "options": describe_options(baseline),
        }
        for baseline in found
    ]


def _show_baselines(rows: list[dict[str, Any]], console: Console) -> None:
    from gradrank.cli.tables import table

    cells = [
        (row["name"], row["summary"], "yes" if row["matched"] else "no", row["source"])
        for row in rows
    ]
    heads = ("baseline", "what it does", "held to the budget", "source")
    console.show("baselines, for 'gradrank compare':", table("", heads, cells, left=4))


def _show_all(rows: list[dict[str, Any]], console: Console) -> None:
    from gradrank.cli.tables import table

    cells = [
        (row["name"], row["summary"], ", ".join(row["signals"]) or "nothing", row["source"])
        for row in rows
    ]
    console.show(table("", ("method", "what it does", "measures", "source"), cells, left=4))
    console.show("options of one: gradrank methods NAME")


def _show_presets(method: str | None, console: Console) -> None:
    from gradrank.cli.tables import table
    from gradrank.presets import presets

    rows = [
        {"name": one.name, "source": one.source, "about": one.about, "run": dict(one.run)}
        for one in presets().values()
        if method in {None, one.run["method"]}
    ]
    if not rows:
        raise OptionError(f"there is no preset of method '{method}'. See them all without NAME.")
    heads = ("preset", "method", "budget", "lr", "epochs", "source")
    keys = heads[1:-1]
    cells = [(r["name"], *(str(r["run"].get(k, "")) for k in keys), r["source"]) for r in rows]
    console.show(table("", heads, cells, left=4))
    for about in dict.fromkeys(row["about"] for row in rows):
        console.show(about)
    console.show(f"use: gradrank train --preset {rows[0]['name']} --data FILE --head lm --out DIR")
    console.result({"presets": rows})


def _show_one(row: dict[str, Any], console: Console) -> None:
    from gradrank.cli.tables import table

    console.show(f"{row['name']}: {row['summary']}", f"source: {row['source']}")
    if "signals" in row:
        console.show(f"measures: {', '.join(row['signals']) or 'nothing'}")
    cells = [(o["name"], str(o["default"]), o["type"], o["help"]) for o in row["options"]]
    if cells:
        console.show(table("", ("option", "default", "type", "what it does"), cells, left=4))
        if "signals" in row:
            console.show(f"use: --method {row['name']} --option {cells[0][0]}={cells[0][1]}")
    else:
        console.show("no options")
