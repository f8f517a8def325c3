"""Which columns of a user's rows are the input and the label."""

from collections.abc import Mapping
from typing import Any

from gradrank.core.errors import DataError, nearest
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.benchmarks.task import Columns
from gradrank.lab.readers import Row

GUESSES = {
    "text": ("text", "sentence", "content", "document"),
    "label": ("label", "labels", "class", "target"),
    "image": ("image", "img", "file", "path", "image_path"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "completion": ("completion", "output", "response", "answer"),
}
# The columns that each head reads, and the option that names each.
HEAD_COLUMNS = {
    "lm": ("text",),
    "classification": ("text", "label"),
    "image": ("image", "label"),
    "instruct": ("prompt", "completion"),
}
# A prompt is a text, and its completion what is to be predicted.
_OPTIONS: dict[str, str] = {
    "text": "text",
    "label": "label",
    "image": "image",
    "prompt": "text",
    "completion": "label",
}


def pick_columns(
    rows: list[Row], head: str, given: Mapping[str, str | None], where: str
) -> Columns:
    """Pick the input and label columns of rows.

    Args:
        rows: The rows.
        head: A key of :data:`HEAD_COLUMNS`.
        given: Columns that the user named: ``text``, ``label``, ``image``, or None.
        where: Name of the data, for messages.

    Returns:
        Inputs and labels.

    Raises:
        DataError: If there are no rows, or a column is not there.
    """
    if not rows:
        raise DataError(f"data '{where}' is empty: it holds no rows.")
    kinds = HEAD_COLUMNS[head]
    names = [_column(rows[0], kind, given.get(_OPTIONS[kind]), where) for kind in kinds]
    if head == "instruct":
        return _prompts(rows, names, where), None
    inputs = [row.get(names[0]) for row in rows]
    labels = [row.get(names[1]) for row in rows] if len(names) > 1 else None
    return inputs, labels


def _prompts(rows: list[Row], names: list[str], where: str) -> list[Prompt]:
    found = []
    for number, row in enumerate(rows, start=1):
        texts = [row.get(name) for name in names]
        wrong = next((i for i, text in enumerate(texts) if not _is_text(text)), None)
        if wrong is not None:
            raise DataError(
                f"data '{where}': row {number} has no text in column '{names[wrong]}'. Fill or "
                f"remove it."
            )
        found.append(Prompt(str(texts[0]), str(texts[1]), ""))
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _column(row: Row, kind: str, given: str | None, where: str) -> str:
    if given is not None:
        if given not in row:
            raise DataError(f"data '{where}' has no column '{given}'. {nearest(given, row)}")
        return given
    lowered = {name.lower(): name for name in row}
    found = next((lowered[guess] for guess in GUESSES[kind] if guess in lowered), None)
    if found is None:
        raise DataError(
            f"data '{where}' has no column that looks like the {kind} (tried: "
            f"{', '.join(GUESSES[kind])}). Name it with "
            f"--{_OPTIONS[kind]}-column. Known: {', '.join(row)}."
        )
    return found
