"""``gradrank methods``: what there is, with source and options."""

from typing import Any

import click

from gradrank.cli.console import Console
from gradrank.cli.options import COMMON, flags
from gradrank.cli.settings import check_method
from gradrank.cli.verb import Verb

EXAMPLES = """\
gradrank methods
gradrank methods gard
gradrank methods --json"""


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("name", required=False)
@flags(*COMMON)
def command(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the methods with their sources; with NAME, one method with its options."""
    console = Console(as_json, quiet)
    if name is not None:
        check_method(name)
    with console.working():
        rows = describe(name)
    if name is None:
        _show_all(rows, console)
        console.result({"methods": rows})
    else:
        _show_one(rows[0], console)
        console.result(rows[0])


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """Return methods as plain data.

    Args:
        name: One of them; None: all.

    Returns:
        Per method ``name``, ``summary``, ``source``, ``signals`` and ``options``.
    """
    from gradrank.methods.method import describe_options
    from gradrank.methods.registry import METHODS
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


def _show_all(rows: list[dict[str, Any]], console: Console) -> None:
    from gradrank.cli.tables import table

    cells = [
        (row["name"], row["summary"], ", ".join(row["signals"]) or "nothing", row["source"])
        for row in rows
    ]
    console.show(table("", ("method", "what it does", "measures", "source"), cells, left=4))
    console.show("options of one: gradrank methods NAME")


def _show_one(row: dict[str, Any], console: Console) -> None:
    from gradrank.cli.tables import table

    console.show(
        f"{row['name']}: {row['summary']}",
        f"source: {row['source']}",
        f"measures: {', '.join(row['signals']) or 'nothing'}",
    )
    cells = [(o["name"], str(o["default"]), o["type"], o["help"]) for o in row["options"]]
    if cells:
        console.show(table("", ("option", "default", "type", "what it does"), cells, left=4))
        console.show(f"use: --method {row['name']} --option {cells[0][0]}={cells[0][1]}")
    else:
        console.show("no options")
