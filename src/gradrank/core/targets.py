"""Targets: the modules that can carry a LoRA adapter, and what one rank on them costs."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradrank.core.errors import TargetError, nearest


@dataclass(frozen=True, slots=True)
class Target:
    """One adaptable module.

    Attributes:
        name: Full dotted name in the base model, for example ``model.layers.0.mlp.up_proj``.
        d_in: Input features.
        d_out: Output features.
        kind: Kind of layer: ``linear``, ``conv1d`` (GPT-2) or ``quantized-linear``.
    """

    name: str
    d_in: int
    d_out: int
    kind: str = "linear"

    @property
    def cost(self) -> int:
        """Trainable parameters of one rank, ``d_in + d_out``."""
        return self.d_in + self.d_out

    @property
    def max_rank(self) -> int:
        """Largest rank that adds directions, ``min(d_in, d_out)``."""
        return min(self.d_in, self.d_out)

    @property
    def module_type(self) -> str:
        """Last part of the name (``up_proj``), by which reports group targets."""
        return self.name.rpartition(".")[2]

    @property
    def depth(self) -> int | None:
        """First number in the dotted name (the block index), or None if it has none."""
        return next((int(part) for part in self.name.split(".") if _is_index(part)), None)

    @property
    def stack(self) -> str:
        """Name before the block index (``encoder.layer``), which tells stacks apart."""
        parts = self.name.split(".")
        end = next((i for i, part in enumerate(parts) if _is_index(part)), 0)
        return ".".join(parts[:end])


def _is_index(part: str) -> bool:
    # Names may come from files: other scripts' digits and giant numbers are no block index.
    return part.isascii() and part.isdigit() and len(part) <= 6


def cost_of_rank_one(targets: Iterable[Target]) -> int:
    """Return the parameters of rank 1 on every target, the cost of the thinnest uniform LoRA.

    Args:
        targets: The targets.

    Returns:
        Sum of ``d_in + d_out`` in parameters.
    """
    return sum(target.cost for target in targets)


def select_names(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Select full module names by the patterns that a user wrote.

    A pattern selects a name when it equals the name, equals its last dotted parts (as in PEFT:
    ``q_proj``, ``self_attn.q_proj``), or, written ``re:...``, matches the full name as a regular
    expression.

    Args:
        names: Candidate full names.
        wanted: Patterns.

    Returns:
        The selected names, in the order of ``names``.

    Raises:
        TargetError: If ``wanted`` is empty, or a pattern selects nothing or is no valid
            expression.
    """
    if not wanted:
        raise TargetError("no target pattern was given. Use 'all-linear' or module names.")
    selected: set[str] = set()
    for pattern in wanted:
        hits = {name for name in names if _matches(pattern, name)}
        if not hits:
            leaves = {name.rpartition(".")[2] for name in names}
            raise TargetError(
                f"target pattern '{pattern}' matches no module that can carry LoRA "
                f"({len(names)} candidates). {nearest(pattern, leaves)}"
            )
        selected |= hits
    return [name for name in names if name in selected]


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(
                f"target pattern '{pattern}' is not a valid regular expression: {error}."
            ) from error
    return name == pattern or name.endswith("." + pattern)
