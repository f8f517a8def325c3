"""Blocks of code in README and docs, and what is wrong with a command line in one."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from gradrank.cli.main import VERBS, main
from gradrank.core.budget import Budget
from gradrank.core.errors import GradrankError
from gradrank.lab.tasks import find_task
from gradrank.methods.registry import METHODS, create

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
_FENCE = re.compile(r"^```(\{?[\w-]*\}?)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block; directives have braces around their name."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[list[str]]:
    """The words after ``gradrank``, of every line of a block that calls it."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["gradrank"] and len(words) > 1:
            yield words[1:]


def wrong_with(words: list[str]) -> str | None:
    """What the program would refuse about a command, as far as it can be told without files.

    Args:
        words: The verb and what follows it.

    Returns:
        What is wrong, or None.
    """
    verb = words[0]
    if verb.startswith("-"):
        return None
    if verb not in VERBS:
        return f"verb '{verb}' is unknown"
    context = click.Context(main, info_name="gradrank")
    command = main.get_command(context, verb)
    assert command is not None
    own = click.Context(command, context, info_name=verb)
    try:
        values, _, _ = command.make_parser(own).parse_args(list(words[1:]))
        for param in command.params:
            if isinstance(param.type, click.Choice | click.IntRange | click.FloatRange):
                param.type_cast_value(own, values.get(param.name))
        _check(values)
    except (click.ClickException, GradrankError) as error:
        return f"{' '.join(words)}: {error}"
    return _missing(verb, words)


def _check(values: Mapping[str, Any]) -> None:
    method, options = values.get("method"), values.get("option") or values.get("options") or []
    if isinstance(method, str):
        create(method)
        # Values are words that may need a run to be read ("1 epoch"): names are compared.
        known = {option.name for option in dataclasses.fields(METHODS[method])}
        if unknown := {str(option).split("=", 1)[0] for option in options} - known:
            raise GradrankError(f"options {unknown} of '{method}' are unknown")
    if isinstance(values.get("task"), str):
        find_task(values["task"])
    if isinstance(values.get("budget"), str):
        Budget.parse(values["budget"])


def _missing(verb: str, words: list[str]) -> str | None:
    recipes = [word for word in words if word.startswith("recipes/")]
    gone = [word for word in recipes if not (ROOT / word).exists()]
    return f"{verb}: '{gone[0]}' does not exist" if gone else None
