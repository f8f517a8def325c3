"""The directive ``cli-reference``: every verb with its flags, from the program itself."""

from collections.abc import Iterator

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from gradrank.cli.main import main


class CliReference(SphinxDirective):
    """A section per verb: what it does, its flags under their headings, its examples."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        context = click.Context(main, info_name="gradrank")
        verbs = {name: main.get_command(context, name) for name in main.list_commands(context)}
        return [_section(name, verb, context) for name, verb in verbs.items() if verb]


def _section(name: str, verb: click.Command, above: click.Context) -> nodes.section:
    context = click.Context(verb, above, info_name=name)
    section = nodes.section(ids=[f"gradrank-{name}"], names=[f"gradrank {name}"])
    section += nodes.title("", f"gradrank {name}")
    usage = " ".join(["gradrank", name, *verb.collect_usage_pieces(context)])
    section += _code(usage, "text")
    for text in (verb.help or "").split("\n\n"):
        section += nodes.paragraph("", " ".join(text.split()))
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in verb.get_params(context):
        record = param.get_help_record(context)
        if record and record[1]:
            groups.setdefault(getattr(param, "group", "Other"), []).append(record)
    for heading in sorted(groups, key=lambda group: group == "Other"):
        section += nodes.rubric("", heading)
        section += nodes.definition_list("", *_items(groups[heading]))
    examples = getattr(verb, "examples", "")
    if examples:
        section += [nodes.rubric("", "Examples"), _code(examples, "sh")]
    return section


def _items(records: list[tuple[str, str]]) -> Iterator[nodes.definition_list_item]:
    for flags, text in records:
        term = nodes.term("", "", nodes.literal("", flags))
        # Two hyphens are a flag here, never a dash.
        body = nodes.paragraph("", text, support_smartquotes=False)
        yield nodes.definition_list_item("", term, nodes.definition("", body))


def _code(text: str, language: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language=language)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("cli-reference", CliReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
