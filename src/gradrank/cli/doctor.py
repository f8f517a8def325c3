"""``gradrank doctor``: what is here, what works here, and what to do where it does not."""

import os
from collections.abc import Sequence
from pathlib import Path

import click

from gradrank.cli.console import Console
from gradrank.cli.doctor_findings import NO, NOTE, OK, Finding, guarded
from gradrank.cli.exits import DONE, FAILED
from gradrank.cli.options import COMMON, extra, flags
from gradrank.cli.verb import Verb

EXAMPLES = """\
gradrank doctor
gradrank doctor my-run
gradrank doctor --quick --json"""
_MARKS = {OK: "  ok   ", NOTE: "  note ", NO: "  NO   "}


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@extra(
    "Running",
    "--quick",
    is_flag=True,
    default=False,
    show_default=False,
    help="Look only: load no PyTorch and try nothing.",
)
@flags(*COMMON)
def command(path: Path | None, quick: bool, as_json: bool, quiet: bool) -> int:
    """Say what is installed, what the machine has, and what works here, found out by trying.

    With PATH (a model, an adapter, the folder of a run or of a comparison, a plan, a record or a
    measurement): what it is, and whether it is whole. The exit status is 0 if the main job, plan
    and then train, works here and nothing at PATH is damaged, else 1.
    """  # noqa: DOC201 - the text is the verb's help
    console = Console(as_json, quiet)
    with console.working():
        if path is not None:
            from gradrank.cli.doctor_path import examine

            found = examine(path)
        else:
            found = look() + ([] if quick else trials(console))
    broken = [one for one in found if one.breaks or (path is not None and one.status == NO)]
    console.show(*lines(found), "", verdict(broken, path, quick))
    console.result(
        {
            "ok": not broken,
            "tried": path is None and not quick,
            "path": None if path is None else str(path),
            "findings": [one.to_dict() for one in found],
        }
    )
    return FAILED if broken else DONE


def look() -> list[Finding]:
    """Look at packages, machine and settings, without loading PyTorch."""
    from gradrank.cli import doctor_machine as machine
    from gradrank.cli import doctor_packages as packages

    cores = machine.usable_cores()
    environment = dict(os.environ)
    return [
        *guarded(packages.SECTION, "packages", packages.package_findings),
        *guarded(packages.PROBLEMS, "known problems", packages.problem_findings),
        *guarded(machine.SECTION, "processor", lambda: [machine.processor_finding()]),
        *guarded(machine.SECTION, "memory", lambda: [machine.memory_finding()]),
        *guarded(machine.SECTION, "disk", machine.disk_findings),
        *guarded(machine.SETTINGS, "threads", lambda: [machine.thread_finding(environment, cores)]),
        *guarded(machine.SETTINGS, "network", lambda: [machine.network_finding(environment)]),
        *guarded(machine.SETTINGS, "cache", machine.cache_findings),
    ]


def trials(console: Console) -> list[Finding]:
    """Try what works here.

    Args:
        console: Says which trial is going on.

    Returns:
        What was found.
    """
    from gradrank.cli.doctor_child import try_out

    console.say("trying what works here with a tiny model (--quick looks only)")
    return try_out(say=lambda name: console.say(f"trying: {name}"))


def lines(found: Sequence[Finding]) -> list[str]:
    """Return findings as lines, under their headings, each remedy below its finding.

    Args:
        found: The findings.

    Returns:
        The lines.
    """
    from gradrank.report.text import clean

    told: list[str] = []
    for section in dict.fromkeys(one.section for one in found):
        members = [one for one in found if one.section == section]
        width = min(28, max(len(one.name) for one in members))
        told += ([""] if told else []) + [f"{clean(section, 200)}:"]
        for one in members:
            told.append(f"{_MARKS[one.status]}{clean(one.name):{width}}  {clean(one.text, 700)}")
            if one.remedy:
                told.append(f"{'':7}{'':{width}}  -> {clean(one.remedy)}")
    return told


def verdict(broken: Sequence[Finding], path: Path | None, quick: bool) -> str:
    """Return the last line: whether all is well.

    Args:
        broken: What is not.
        path: What was examined; None: the installation.
        quick: Whether nothing was tried.

    Returns:
        The line.
    """
    names = ", ".join(dict.fromkeys(one.name for one in broken))
    if path is not None:
        return f"'{path}' is damaged: {names}." if broken else f"'{path}' is whole."
    if broken:
        return f"gradrank does not work here: {names}. Follow the arrows above."
    looked = "Nothing that is missing keeps gradrank from working here; nothing was tried."
    return looked if quick else "gradrank works here: a tiny model was planned and trained."
