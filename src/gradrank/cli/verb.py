"""How a verb's help looks: flags under headings, examples as they are written."""

from collections.abc import Callable
from typing import Any

import click


class Flag(click.Option):
    """An option that knows under which heading ``--help`` lists it."""

    def __init__(self, *names: str, group: str, **rest: Any) -> None:
        super().__init__(list(names), **rest)
        self.group = group


def flag(group: str, *names: str, **rest: Any) -> Callable[[], Flag]:
    """Return what makes a flag; every verb needs one of its own.

    Args:
        group: Heading.
        *names: As for ``click.Option``.
        **rest: As for ``click.Option``; defaults are shown unless it says otherwise.

    Returns:
        A function without arguments.
    """
    rest.setdefault("show_default", True)
    return lambda: Flag(*names, group=group, **rest)


def switch(group: str, name: str, text: str) -> Callable[[], Flag]:
    """Return what makes a flag without a value, off unless it is given.

    Args:
        group: Heading.
        name: Its name.
        text: Its help.

    Returns:
        A function without arguments.
    """
    return flag(group, name, is_flag=True, default=False, show_default=False, help=text)


class Verb(click.Command):
    """A verb: its flags are listed under headings, its examples as they are written."""

    def __init__(self, *args: Any, examples: str = "", **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the flags by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "group", "Other"), []).append(record)
        for heading in sorted(groups, key=lambda name: name == "Other"):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the examples."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples.splitlines()))
