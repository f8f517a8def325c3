"""PEFT itself: exact ranks and scales in anchored patterns."""

from pathlib import Path
from typing import ClassVar

from gradrank.serving.adapter import Adapter
from gradrank.serving.engines.engine import Base
from gradrank.serving.facts import AdapterFacts
from gradrank.serving.folder import write_exact
from gradrank.serving.reading import read_adapter


class Peft:
    """A stock PEFT adapter, which everything that builds on PEFT loads."""

    name: ClassVar[str] = "peft"
    pads: ClassVar[str] = "none"
    paddings: ClassVar[tuple[str, ...]] = ("none", "groups", "all")

    def judge(self, facts: AdapterFacts) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        config = facts.config
        if config.kind == "ADALORA":
            return ()
        wrong = [t.name for t, rank in facts.ranks.items() if config.told_rank(t.name) != rank]
        if not wrong:
            return ()
        return (
            f"the configuration says rank {config.told_rank(wrong[0])} for '{wrong[0]}' and its "
            f"weights have another ({len(wrong)} such modules)",
        )

    def write(self, adapter: Adapter, folder: Path, base: Base) -> None:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        write_exact(adapter, folder, base.modules)

    def read(self, folder: Path, base: Base) -> Adapter:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        del base
        return read_adapter(folder)

    def advice(self, adapter: Adapter, base: Base | None = None) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        del adapter, base
        return ("load it with PeftModel.from_pretrained(base, folder)",)
