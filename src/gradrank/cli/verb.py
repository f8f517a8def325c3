"""How a verb's help looks: flags under headings, examples as they are written."""

from typing import Any

import click


class Flag(click.Option):
    """An option that knows under which heading ``--help`` lists it."""

    def __init__(self, *names: str, group: str, **rest: Any) -> None:
        super().__init__(list(names), **rest)
        self.group = group


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
