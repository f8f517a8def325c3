"""Ctrl-C and SIGTERM as a request to stop in order."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Stopper:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the current step.

    A context manager. The second one raises KeyboardInterrupt at once. Outside the main thread it
    does nothing, because only the main thread may set signal handlers.

    Attributes:
        asked: Whether stopping was asked for.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            tell: Receives one line when stopping was asked for.
        """
        self.tell, self.asked = tell, False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        """Take the signals over, and return this object."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Who ignores a signal (a worker of a grid, a job of nohup) means it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _in_worker(number)
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.tell("stopping after this step and saving; press Ctrl-C again to stop at once")


def _in_worker(number: int) -> None:
    """A process that prepares batches inherits the handlers: Ctrl-C is for training to act on."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
