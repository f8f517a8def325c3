"""``gradrank tasks``: data that needs no file of the user's."""

import click

from gradrank.cli.console import Console
from gradrank.cli.options import COMMON, flags
from gradrank.cli.verb import Verb

EXAMPLES = """\
gradrank tasks
gradrank tasks --json"""


@click.command(cls=Verb, examples=EXAMPLES)
@flags(*COMMON)
def command(as_json: bool, quiet: bool) -> None:
    """List the registered tasks with head and metric, and with --json source and licence."""
    console = Console(as_json, quiet)
    with console.working():
        from gradrank.cli.tables import table
        from gradrank.lab.tasks import TASKS

        rows = [
            {
                "name": task.name,
                "head": task.head,
                "metric": task.metric,
                "description": task.description,
                "source": task.source,
                "licence": task.licence,
            }
            for task in TASKS.values()
        ]
    heads = ("name", "head", "metric", "description")
    cells = [[row[head] for head in heads] for row in rows]
    console.show(table("", ("task", *heads[1:]), cells, left=4))
    console.show(
        "use: --task NAME (with --data-dir DIR for public data in a folder); for your own data: "
        "--data FILE --head lm|classification|image|instruct; --json tells sources and licences"
    )
    console.result({"tasks": rows})
