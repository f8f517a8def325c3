"""From what the user names to examples: texts or pictures with checked labels, in two splits.

Encoding for a model is the next step, :mod:`gradrank.lab.encode`; the labels must be known before
the model can be loaded with a head of the right size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.lab.hub import read_public
from gradrank.lab.labels import index_labels
from gradrank.lab.readers import READERS, Row, data_suffix, read_image_folder, read_rows
from gradrank.lab.tasks import TASKS, Task, find_task

Say = Callable[[str], None] | None

GUESSES = {
    "text": ("text", "sentence", "content", "document"),
    "label": ("label", "labels", "class", "target"),
    "image": ("image", "img", "file", "path", "image_path"),
}


@dataclass(frozen=True, slots=True)
class DataSpec:
    """What the user says about the data.

    Attributes:
        source: A registered task, a data file, a folder ``class/picture``, or a public data set
            (``name`` or ``name:configuration``).
        head: ``lm``, ``classification`` or ``image``; None takes the task's own.
        text_column: Column with the text; None looks for a usual name.
        label_column: Column with the class; None looks for a usual name.
        image_column: Column with the path of a picture, relative to the file; None as above.
        eval_file: File or folder with the evaluation split; None holds a part out.
        eval_fraction: Share of the examples that is held out when ``eval_file`` is None.
        seed: Seed of that choice.
    """

    source: str
    head: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    eval_file: str | None = None
    eval_fraction: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """Examples of one split.

    Attributes:
        inputs: Texts, or pictures (paths, PIL images, or arrays ``[height, width, 3]``).
        labels: Class index of each input; None for ``lm``.
    """

    inputs: Sequence[Any]
    labels: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Examples:
    """Checked examples of both splits.

    Attributes:
        head: ``lm``, ``classification`` or ``image``.
        train: Training split.
        eval: Evaluation split.
        label_names: Names of the classes by index; empty for ``lm``.
        metric: The metric that counts.
        describe: ``name``, ``source`` and ``licence`` in words.
    """

    head: str
    train: Split
    eval: Split
    label_names: tuple[str, ...]
    metric: str
    describe: dict[str, Any] = field(default_factory=dict)


def read_examples(spec: DataSpec, say: Say = None) -> Examples:
    """Read and check the data that a user named.

    Args:
        spec: What the user said.
        say: Receives one line for each thing that takes time.

    Returns:
        The examples.

    Raises:
        OptionError: If an option is unknown or out of range.
        DataError: If the data is missing, malformed or not usable for the head.
    """
    if not 0.0 < spec.eval_fraction < 1.0:
        raise OptionError(f"eval_fraction is {spec.eval_fraction}; choose a share in (0, 1).")
    task = _task(spec)
    if task is not None:
        (inputs, labels), held = task.load(say), None
        head, metric = task.head, task.metric
        about = {"name": task.name, "source": task.source, "licence": task.licence}
    else:
        local = _is_local(spec.source)
        head = spec.head or ""
        if head not in HEAD_COLUMNS:
            known = nearest(head, HEAD_COLUMNS)
            raise OptionError(f"data '{spec.source}' needs a head (--head), got '{head}'. {known}")
        metric = "eval_loss" if head == "lm" else "accuracy"
        rows, held_rows, about = _rows(spec, head, local)
        (inputs, labels) = _columns(rows, spec, head, spec.source)
        held = None if held_rows is None else _columns(held_rows, spec, head, "evaluation data")
    return _split(inputs, labels, held, head, metric, spec, about)


# The columns that each head reads, and the option that names each.
HEAD_COLUMNS = {"lm": ("text",), "classification": ("text", "label"), "image": ("image", "label")}


def _task(spec: DataSpec) -> Task | None:
    if spec.source not in TASKS:
        return None
    task = find_task(spec.source)
    if spec.head not in {None, task.head}:
        raise OptionError(f"task '{task.name}' has the head '{task.head}', not '{spec.head}'.")
    if spec.eval_file is not None or spec.text_column or spec.label_column or spec.image_column:
        raise OptionError(
            f"task '{task.name}' brings its own columns and evaluation split. Leave out the column "
            f"options and the evaluation file, or give your own data file."
        )
    return task


def _rows(
    spec: DataSpec, head: str, local: bool
) -> tuple[list[Row], list[Row] | None, dict[str, Any]]:
    """Return training rows, evaluation rows (None: hold some out) and a description."""
    path = Path(spec.source).expanduser()
    held = None
    if spec.eval_file is not None:
        held = _local(Path(spec.eval_file).expanduser(), head, spec.image_column)
    if local:
        about = {"name": path.name, "source": "local data", "licence": ""}
        return _local(path, head, spec.image_column), held, about
    rows, public_held = read_public(spec.source, f"Registered tasks: {', '.join(TASKS)}.")
    about = {"name": spec.source, "source": "public data set", "licence": "see the data set"}
    return rows, public_held if held is None else held, about


def _is_local(source: str) -> bool:
    path = Path(source).expanduser()
    if path.exists() or data_suffix(path) in READERS or source.startswith((".", "/", "~")):
        return True
    hint = nearest(source, TASKS)
    if hint.startswith("Did you mean"):
        raise OptionError(f"unknown task '{source}', and no such file. {hint}")
    return False


def _local(path: Path, head: str, image_column: str | None) -> list[Row]:
    if path.is_dir():
        if head != "image":
            raise DataError(f"data '{path}' is a folder; only the 'image' head reads one.")
        return read_image_folder(path)
    rows = read_rows(path)
    for row in rows if head == "image" else ():
        for name, value in row.items():
            # A picture's path stands relative to the file that names it.
            named = name == image_column or name.lower() in GUESSES["image"]
            if named and isinstance(value, str) and value.strip():
                row[name] = path.parent / value
    return rows


def _columns(
    rows: list[Row], spec: DataSpec, head: str, where: str
) -> tuple[list[Any], list[Any] | None]:
    """Pick the input and label columns of rows."""
    if not rows:
        raise DataError(f"data '{where}' is empty: it holds no rows.")
    given = {"text": spec.text_column, "label": spec.label_column, "image": spec.image_column}
    names = [_column(rows[0], kind, given[kind], where) for kind in HEAD_COLUMNS[head]]
    inputs = [row.get(names[0]) for row in rows]
    labels = [row.get(names[1]) for row in rows] if len(names) > 1 else None
    return inputs, labels


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
            f"{', '.join(GUESSES[kind])}). Name it with --{kind}-column. Known: "
            f"{', '.join(row)}."
        )
    return found


def _split(
    inputs: list[Any],
    labels: list[Any] | None,
    held: tuple[list[Any], list[Any] | None] | None,
    head: str,
    metric: str,
    spec: DataSpec,
    about: dict[str, Any],
) -> Examples:
    train_inputs = _checked_inputs(inputs, head, spec.source)
    held_inputs = None if held is None else _checked_inputs(held[0], head, "evaluation data")
    names: tuple[str, ...] = ()
    train_labels = held_labels = None
    if labels is not None:
        names, train_labels, held_labels = index_labels(
            labels, None if held is None else held[1], spec.source
        )
    if held_inputs is not None:
        train, evaluation = Split(train_inputs, train_labels), Split(held_inputs, held_labels)
    else:
        train, evaluation = hold_out(
            Split(train_inputs, train_labels), spec.eval_fraction, spec.seed, spec.source
        )
    return Examples(head, train, evaluation, names, metric, about)


def _checked_inputs(inputs: list[Any], head: str, where: str) -> list[Any]:
    if head == "lm":
        texts = [text for text in inputs if text is not None and str(text).strip()]
        if not texts:
            raise DataError(f"data '{where}' is empty: none of its {len(inputs)} rows has text.")
        inputs = texts
    missing = [
        number
        for number, value in enumerate(inputs, start=1)
        if value is None or (isinstance(value, str) and not value.strip())
    ]
    if missing:
        raise DataError(
            f"data '{where}': {len(missing)} of {len(inputs)} rows have no input, the first is row "
            f"{missing[0]}. Fill or remove them."
        )
    wrong = next(
        (value for value in inputs if head != "image" and not isinstance(value, str)), None
    )
    if wrong is not None:
        raise DataError(
            f"data '{where}': the text column holds {type(wrong).__name__} ({str(wrong)[:40]!r}), "
            f"expected text. Choose another column with --text-column."
        )
    return inputs


def hold_out(split: Split, fraction: float, seed: int, where: str) -> tuple[Split, Split]:
    """Part a split in two, at random, the same way for the same seed.

    Args:
        split: All examples.
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the choice.
        where: Name of the data, for messages.

    Returns:
        The larger part and the held-out part, both in the order of ``split``.

    Raises:
        DataError: If there are fewer than two examples.
    """
    count = len(split.inputs)
    if count < 2:
        raise DataError(
            f"data '{where}' has {count} example(s); at least 2 are needed to hold one out for "
            f"evaluation. Give more data or an evaluation file."
        )
    size = min(max(round(count * fraction), 1), count - 1)
    chosen = set(np.random.default_rng(seed).permutation(count)[:size].tolist())
    kept = [index for index in range(count) if index not in chosen]
    return _take(split, kept), _take(split, sorted(chosen))


def _take(split: Split, indices: list[int]) -> Split:
    labels = None if split.labels is None else [split.labels[index] for index in indices]
    return Split([split.inputs[index] for index in indices], labels)
