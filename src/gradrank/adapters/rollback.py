"""All or nothing: undo what was done, last first, if a later step fails."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from torch import nn

from gradrank.adapters.view import adapter_config
from gradrank.core.errors import SurgeryError


class Rollback:
    """A context manager that undoes what was done inside if something fails there."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._undo.clear()
            return
        failed = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as another:  # the rest has to be undone too
                failed.append(f"{type(another).__name__}: {another}")
        if isinstance(error, Exception):
            state = "was undone; model and optimizer are as they were"
            if failed:
                state = f"could not be undone entirely ({'; '.join(failed)}); load a checkpoint"
            raise SurgeryError(
                f"moving capacity failed and {state}: {type(error).__name__}: {error}"
            ) from error

    def push(self, undo: Callable[[], object]) -> None:
        """Remember how to undo what is about to be done.

        Args:
            undo: Called, last one first, if a later step fails.
        """
        self._undo.append(undo)

    def remember_config(self, model: nn.Module, adapter: str) -> None:
        """Remember PEFT's configuration of an adapter.

        Args:
            model: The PEFT model.
            adapter: Name of the adapter.
        """
        held = vars(adapter_config(model, adapter))
        before = dict(held)

        def undo() -> None:
            held.clear()
            held.update(before)

        self.push(undo)
