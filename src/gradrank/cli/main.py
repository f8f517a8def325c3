"""Entry point ``gradrank``: verbs are imported when they are used, errors end in one message."""

import contextlib
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from gradrank import __version__
from gradrank.cli.exits import DONE, FAILED, INTERRUPTED, REFUSED, RunFailedError
from gradrank.core.errors import GradrankError, OutputError, nearest
from gradrank.lab.quiet import quieten_libraries

# Verb: one line for the listing. The module of a verb is imported when the verb is used.
VERBS = {
    "demo": "Uniform, gard and waterfill on a real model, end to end, in minutes.",
    "plan": "Measure gradients and decide which rank each module gets.",
    "train": "Fine-tune a model with the capacity placed by a method or a plan.",
    "compare": "Compare methods over budgets, tasks and seeds, with paired statistics.",
    "show": "Print a plan or an adapter: ranks, parameters, scales.",
    "report": "Draw one HTML page from the records of runs.",
    "export": "Write an adapter for others to load, with a check of its logits.",
    "methods": "List the methods, with their sources and options.",
    "tasks": "List the tasks that need no data file.",
    "doctor": "Say what is installed, what works here, and whether a folder is whole.",
    "completion": "Print what makes a shell complete verbs, flags and names.",
}

START = """\
Start here:
  gradrank demo                                  a real model, three methods, one report
  gradrank plan --model MODEL --data FILE --head lm --budget uniform:8 --out my-plan
  gradrank train --plan my-plan/plan.json --model MODEL --data FILE --head lm --out my-run

If something does not work, 'gradrank doctor' says what this machine lacks."""
EXITS = (
    ("0", "done"),
    ("1", "a run began and failed, or a defect of gradrank"),
    ("2", "refused: the message says what was wrong with the input, and what to do"),
    ("130", "interrupted"),
)

# What the parts of the package that need an extra import, and the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "filelock", "gguf", "PIL", "psutil"), "train"),
    "onnx": "vision",
}
_WORDS = {
    "is not a valid integer range": "is not a whole number",
    "is not a valid float range": "is not a number",
    "is not a valid integer": "is not a whole number",
    "is not a valid float": "is not a number",
}

_SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"], "show_default": True}


class Verbs(click.Group):
    """The verbs, imported lazily, and the one place where errors become messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order in which a newcomer needs them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"gradrank.cli.{cmd_name}").command
        if ctx.resilient_parsing:  # a shell asks how a line goes on
            from gradrank.cli.completion import teach

            teach(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown verb with the nearest one."""
        if args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"verb '{args[0]}' is unknown. {nearest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the exit statuses."""
        with formatter.section("Exit status"):
            formatter.write_dl(EXITS)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and leave with an exit status: 0 done, 1 failure, 2 refused, 130 interrupted."""
        quieten_libraries()  # before a verb imports any
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given or os.environ.get("GRADRANK_DEBUG", "") not in {"", "0"}
        extra |= {"complete_var": complete_var, "windows_expand_args": windows_expand_args}
        if not standalone_mode:
            return super().main(given, "gradrank", standalone_mode=False, **extra)
        try:
            status = super().main(given, "gradrank", standalone_mode=False, **extra)
        except BaseException as error:
            status = explain(error, debug)
        # Return values of verbs are exit statuses; anything else means done.
        sys.exit(status if isinstance(status, int) else DONE)


def explain(error: BaseException, debug: bool) -> int:
    """Print what went wrong, as one message on stderr.

    Args:
        error: What was raised.
        debug: Whether to print the traceback too.

    Returns:
        The exit status.

    Raises:
        SystemExit: If that is what was raised.
    """
    if isinstance(error, SystemExit):
        raise error
    if debug and not isinstance(error, click.exceptions.Exit | click.Abort):
        traceback.print_exception(error)
    if isinstance(error, click.Abort | KeyboardInterrupt | EOFError):
        _say(_interruption(error))
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        _say(f"error: {_worded(error)}")
        context = getattr(error, "ctx", None)
        if context is not None:
            _say(f"See '{context.command_path} --help'.")
        return error.exit_code
    if isinstance(error, GradrankError):
        _say(f"error: {error}")
        # An existing folder is refused input; a full disk is a failure.
        broke = isinstance(error, OutputError) and isinstance(error.__cause__, OSError)
        return FAILED if broke or isinstance(error, RunFailedError) else REFUSED
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        _say(f"error: no space left on the device{_place(error)}. Free some space and try again.")
        return FAILED
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = EXTRAS[error.name]
        _say(
            f"error: this needs the package '{error.name}', which is not installed. Run: pip "
            f"install 'gradrank[{extra}]'"
        )
        return REFUSED
    text = " ".join(str(error).split()) or "no message"
    _say(f"error: {type(error).__name__}: {text[:500]}")
    if not debug:
        _say("This was not foreseen. Run again with --debug (or GRADRANK_DEBUG=1) for a traceback.")
    return FAILED


def _worded(error: click.ClickException) -> str:
    """Return click's message on one line, in plain words, with the nearest of several choices."""
    text = " ".join(error.format_message().split())
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    kind = getattr(getattr(error, "param", None), "type", None)
    given = re.search(r"'([^']*)' is not one of ", text)
    if given is not None and isinstance(kind, click.Choice):
        text = f"{text[: given.end(1) + 1]} is unknown. {nearest(given[1], map(str, kind.choices))}"
    return text


def _interruption(error: BaseException) -> str:
    """Return what a verb says about what an interruption left behind."""
    cause = error.__cause__ if isinstance(error, click.Abort) else error
    text = str(cause) if cause is not None else ""
    if text.startswith("interrupted"):
        return text
    return f"interrupted: {text}" if text else "interrupted"


def _place(error: OSError) -> str:
    return f" while writing '{error.filename}'" if error.filename else ""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


@click.group(cls=Verbs, invoke_without_command=True, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="gradrank", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Print tracebacks of errors.")
@click.pass_context
def main(context: click.Context) -> None:
    """Decide where LoRA capacity goes, under an exact budget of trainable parameters.

    It measures gradients of a few mini-batches of your data, gives each module of the model the
    rank that its gradients ask for, trains, and hands back an ordinary PEFT adapter, which 'export'
    writes for vLLM, SGLang and llama.cpp. 'compare' shows whether that was worth it.

    'gradrank VERB --help' lists a verb's flags, with examples.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        click.echo(f"\n{START}")
