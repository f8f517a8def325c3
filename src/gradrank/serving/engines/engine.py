"""What an engine is to the exporter: a form to write, a rule to read it by, and its limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from gradrank.core.errors import PlanError
from gradrank.serving.adapter import Adapter
from gradrank.serving.facts import AdapterFacts


@dataclass(frozen=True)
class Base:
    """What an engine has to know of the base model.

    Attributes:
        config: The model's configuration as plain data.
        modules: Full names of all its modules.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


class Engine(Protocol):
    """One way to serve an adapter.

    Attributes:
        name: As ``--target`` takes it.
        pads: Padding that is used unless the user asks for another: ``none``, ``groups`` or
            ``all``.
        paddings: The paddings that the engine reads rightly.
    """

    name: ClassVar[str]
    pads: ClassVar[str]
    paddings: ClassVar[tuple[str, ...]]

    def judge(self, facts: AdapterFacts) -> tuple[str, ...]:
        """Return why the engine would not serve an adapter rightly as it is stored.

        Args:
            facts: Of the stored adapter.

        Returns:
            Reasons, each a sentence; empty if the engine is right.
        """
        ...

    def write(self, adapter: Adapter, folder: Path, base: Base) -> None:
        """Write an adapter for the engine.

        Args:
            adapter: The adapter, already padded.
            folder: An existing folder.
            base: The base model.

        Raises:
            PlanError: If the engine cannot express the adapter, naming what.
        """
        ...

    def read(self, folder: Path, base: Base) -> Adapter:
        """Read what was written by the engine's own rule, which is not PEFT's.

        Args:
            folder: What :meth:`write` filled.
            base: The base model.

        Returns:
            The adapter that the engine would compute with.
        """
        ...

    def advice(self, adapter: Adapter, base: Base | None = None) -> tuple[str, ...]:
        """Return how to load it: flags of the server, in lines for the user.

        Args:
            adapter: What was written.
            base: The base model, where it is at hand.
        """
        ...


def plain_only(adapter: Adapter, engine: str) -> None:
    """Refuse what a plain LoRA engine cannot express.

    Args:
        adapter: The adapter.
        engine: Name of the engine, for the message.

    Raises:
        PlanError: If the adapter is more than low-rank updates of linear modules.
    """
    if adapter.features:
        raise PlanError(
            f"the adapter has {'; '.join(adapter.features)}, which {engine} does not load with a "
            "LoRA adapter. Export with target 'merged', which keeps all of it."
        )
    if not adapter.updates:
        raise PlanError("the adapter updates no module, so there is nothing to export.")
