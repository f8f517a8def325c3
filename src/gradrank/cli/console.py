"""What a verb says: results on stdout, everything else on stderr, never mixed."""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from gradrank.cli.exits import RunFailedError, explain_shortage
from gradrank.core.errors import GradrankError
from gradrank.lab.quiet import ignore_their_warnings
from gradrank.record import finite

Report = Callable[[int, int, str], None]
_PIPE_WIDTH = 110


class Console:
    """Speaks for one verb.

    Attributes:
        as_json: Whether stdout carries one JSON object and nothing else.
        quiet: Whether stderr carries warnings and errors only.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._stdout = sys.stdout
        self._note: Callable[[str], None] = _echo

    def say(self, text: str) -> None:
        """Tell the user what is being done (stderr).

        Args:
            text: One line.
        """
        if not self.quiet:
            self._note(text)

    def warn(self, text: str) -> None:
        """Tell the user what needs attention (stderr, also when quiet).

        Args:
            text: One line.
        """
        self._note(f"warning: {text}")

    def show(self, *items: Any) -> None:
        """Print texts or rich renderables on stdout; nothing in JSON mode.

        Args:
            *items: What to print; text is taken literally, without markup.
        """
        if self.as_json:
            return
        import rich.console

        terminal = self._stdout.isatty()
        printer = rich.console.Console(
            file=self._stdout,
            width=None if terminal else _PIPE_WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
        )
        for item in items:
            printer.print(item, soft_wrap=isinstance(item, str))

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the machine-readable result, in JSON mode only.

        Args:
            data: Plain data; numbers that are not finite become null.
        """
        if self.as_json:
            text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False)
            self._stdout.write(text + "\n")
            self._stdout.flush()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep libraries quiet while a verb works, and stdout clean in JSON mode.

        Yields:
            Nothing.

        Raises:
            RunFailedError: If memory or disk ran out; it says what to lower.
        """
        with contextlib.ExitStack() as stack:
            if self.as_json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(warnings.catch_warnings())
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            ignore_their_warnings()
            warnings.showwarning = self._show_warning
            try:
                yield
            except Exception as error:
                told = None if isinstance(error, GradrankError) else explain_shortage(error)
                if told is not None:
                    raise RunFailedError(told) from error
                raise

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Report]:
        """Show how far a long piece of work is: a bar on a terminal, else plain lines.

        Args:
            what: Name of the work.

        Yields:
            ``report(done, total, note)``.
        """
        if self.quiet:
            yield lambda _done, _total, _note="": None
        elif sys.stderr.isatty():
            with _bar(what) as (report, note):
                self._note = note
                try:
                    yield report
                finally:
                    self._note = _echo
        else:
            yield _lines(what, self.say)

    def _show_warning(self, message: Warning | str, *_place: Any, **_more: Any) -> None:
        self.warn(" ".join(str(message).split()))


def _echo(text: str) -> None:
    click.echo(text, err=True)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[tuple[Report, Callable[[str], None]]]:
    """Show a bar; lines must go through the second of what is yielded, so as not to break it."""
    import rich.console
    import rich.progress as rp

    columns = (
        rp.TextColumn("{task.description:<22}", markup=False),
        rp.BarColumn(bar_width=None),
        rp.TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        rp.TextColumn("{task.fields[note]}", markup=False),
        rp.TimeElapsedColumn(),
        rp.TimeRemainingColumn(compact=True),
        rp.TextColumn("left", markup=False),
    )
    with rp.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task: list[rp.TaskID] = []

        def report(done: int, total: int, note: str = "") -> None:
            if not task:
                task.append(bar.add_task(what, total=total, note=""))
            bar.update(task[0], completed=done, total=total, note=note)

        def note(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

        yield report, note


def _lines(what: str, say: Callable[[str], None]) -> Report:
    """Return a reporter that says a line about every tenth of the work."""
    started = time.monotonic()
    last = [-1]

    def report(done: int, total: int, note: str = "") -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > last[0]:
            last[0] = tenth
            seconds = time.monotonic() - started
            more = f", {note}" if note else ""
            say(f"{what}: {done}/{total} ({done / max(total, 1):.0%}{more}, {seconds:.0f} s)")

    return report
