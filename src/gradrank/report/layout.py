"""Where a target stands in a picture of the model: its layer and its module type."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Layers across, module types down.

    Attributes:
        columns: ``(stack, depth)`` per layer; ``("", None)`` collects names without a number.
        rows: Module types, in model order. Names that share their last part inside one layer
            (``attention.output.dense``, ``output.dense``) are told apart by more parts; a target
            without a layer number is its own type, by its full name.
        places: ``(column index, row index)`` per target name.
    """

    columns: tuple[tuple[str, int | None], ...]
    rows: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]

    @property
    def column_labels(self) -> list[str]:
        """Short label per column: the layer's number, or a dash."""
        return ["–" if depth is None else str(depth) for _, depth in self.columns]

    def row_of(self, name: str) -> str:
        """Return the module type of a target.

        Args:
            name: Full name.

        Returns:
            The module type.
        """
        return self.rows[self.places[name][1]]

    def grid(self, values: Mapping[str, float | None]) -> list[list[float | None]]:
        """Arrange one value per target.

        Args:
            values: Value by target name; missing targets leave an empty cell.

        Returns:
            Rows (module types) of columns (layers); None where there is nothing.
        """
        cells: list[list[float | None]] = [[None] * len(self.columns) for _ in self.rows]
        for name, value in values.items():
            column, row = self.places[name]
            cells[row][column] = value
        return cells


def arrange(names: Iterable[str]) -> Layout:
    """Find layers and module types in target names.

    Args:
        names: Full dotted names, in model order; repetitions are ignored.

    Returns:
        The layout; no two targets share a cell.

    Examples:
        >>> layout = arrange(["h.0.q", "h.0.mlp.fc", "h.1.q", "h.1.mlp.fc", "head"])
        >>> layout.rows, layout.column_labels
        (('q', 'fc', 'head'), ['0', '1', '–'])
    """
    split = {name: _split(name) for name in names}
    labels = _row_labels(split)
    stacks = list(dict.fromkeys(stack for stack, depth, _ in split.values() if depth is not None))
    columns: list[tuple[str, int | None]] = []
    for stack in stacks:
        depths = {depth for s, depth, _ in split.values() if s == stack and depth is not None}
        columns += [(stack, depth) for depth in sorted(depths)]
    if any(depth is None for _, depth, _ in split.values()):
        columns.append(("", None))
    rows = list(dict.fromkeys(labels.values()))
    column_at = {column: i for i, column in enumerate(columns)}
    row_at = {row: i for i, row in enumerate(rows)}
    places = {
        name: (column_at[stack, depth], row_at[labels[name]])
        for name, (stack, depth, _) in split.items()
    }
    return Layout(tuple(columns), tuple(rows), places)


def _split(name: str) -> tuple[str, int | None, tuple[str, ...]]:
    # Only short ASCII digits are numbers here: names are untrusted, and int() refuses the rest.
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= 6 and parts[i + 1 :]:
            return ".".join(parts[:i]), int(part), tuple(parts[i + 1 :])
    return "", None, tuple(parts)


def _row_labels(split: Mapping[str, tuple[str, int | None, tuple[str, ...]]]) -> dict[str, str]:
    labels = {name: name for name, (_, depth, _) in split.items() if depth is None}
    by_leaf: dict[str, list[str]] = {}
    for name, (_, depth, rest) in split.items():
        if depth is not None:
            by_leaf.setdefault(rest[-1], []).append(name)
    for names in by_leaf.values():
        longest = max(len(split[name][2]) for name in names)
        for parts in range(1, longest + 1):
            chosen = {name: ".".join(split[name][2][-parts:]) for name in names}
            cells = {(*split[name][:2], chosen[name]) for name in names}
            if len(cells) == len(names) or parts == longest:
                labels.update(chosen)
                break
    return {name: labels[name] for name in split}
