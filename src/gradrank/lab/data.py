"""From what the user names to examples: texts or pictures with checked labels, in two splits.

Encoding for a model is the next step, :mod:`gradrank.lab.encode`; the labels must be known before
the model can be loaded with a head of the right size.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.benchmarks.task import Loaded, Say, Task, Where, check_scoring
from gradrank.lab.columns import GUESSES, HEAD_COLUMNS, pick_columns
from gradrank.lab.hub import read_public
from gradrank.lab.labels import index_labels
from gradrank.lab.readers import READERS, Row, data_suffix, read_image_folder, read_rows
from gradrank.lab.splits import Choice, Split, choose, hold_out
from gradrank.lab.tasks import TASKS, find_task

_CLASSIFIED = ("classification", "image")


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
        seed: Seed of this and all other choices of examples.
        split: What :attr:`Examples.eval` is: ``test``, the split that is reported, or
            ``validation``, a part of the training data.
        validation: Examples held out of the training data for that, whichever split is asked for.
        train_examples: At most so many examples are trained on; None: all.
        eval_examples: At most so many examples are evaluated; None: all. Examples of language
            modelling are documents.
        data_dir: Folder with public data, for registered tasks; ``GRADRANK_DATA`` is searched too.
        scoring: How answers of instruction tasks are found: ``generate`` writes and reads them,
            ``likelihood`` takes the most probable of the allowed ones.
    """

    source: str
    head: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    eval_file: str | None = None
    eval_fraction: float = 0.1
    seed: int = 0
    split: str = "test"
    validation: int = 0
    train_examples: int | None = None
    eval_examples: int | None = None
    data_dir: str | None = None
    scoring: str = "generate"

    @property
    def choice(self) -> Choice:
        """Which examples are used."""
        return Choice(
            self.split, self.validation, self.train_examples, self.eval_examples, self.seed
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """Checked examples of both splits.

    Attributes:
        head: ``lm``, ``classification``, ``image`` or ``instruct``.
        train: Training split.
        eval: Evaluation split.
        label_names: Names of the classes by index; empty for ``lm`` and ``instruct``.
        metric: The metric that counts.
        describe: ``name``, ``source``, ``licence`` and ``split`` in words, and a ``note`` if there
            is something to know.
        task: The registered task, which knows how answers are read; None for other data.
        scoring: How answers are found: ``generate`` or ``likelihood``.
    """

    head: str
    train: Split
    eval: Split
    label_names: tuple[str, ...]
    metric: str
    describe: dict[str, Any] = field(default_factory=dict)
    task: Task | None = None
    scoring: str = "generate"


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
    spec.choice.check()
    # A misspelt name is found before anything is read; whether there are choices only after.
    check_scoring(spec.scoring, spec.source, head="", choices=True)
    task = _task(spec)
    if task is not None:
        loaded, head, metric = task.load(Where(spec.data_dir, say)), task.head, task.metric
        about = {"name": task.name, "source": task.source, "licence": task.licence}
    else:
        local = _is_local(spec.source)
        head = spec.head or ""
        if head not in HEAD_COLUMNS:
            known = nearest(head, HEAD_COLUMNS)
            raise OptionError(f"data '{spec.source}' needs a head (--head), got '{head}'. {known}")
        metric = "accuracy" if head in _CLASSIFIED else "eval_loss"
        rows, held_rows, about = _rows(spec, head, local)
        given = {"text": spec.text_column, "label": spec.label_column, "image": spec.image_column}
        held = (
            None if held_rows is None else pick_columns(held_rows, head, given, "evaluation data")
        )
        loaded = Loaded(pick_columns(rows, head, given, spec.source), held)
    about["split"] = spec.split
    if loaded.notes:
        about["note"] = " ".join(loaded.notes)
    train, evaluation, names = _split(loaded, head, spec, task)
    choices = head == "instruct" and all(prompt.choices for prompt in evaluation.inputs)
    check_scoring(spec.scoring, spec.source, head, choices)
    return Examples(head, train, evaluation, names, metric, about, task, spec.scoring)


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
            raise DataError(
                f"data '{path}' is a folder; only the 'image' head reads one. Give a file."
            )
        return read_image_folder(path)
    rows = read_rows(path)
    for row in rows if head == "image" else ():
        for name, value in row.items():
            # A picture's path stands relative to the file that names it.
            named = name == image_column or name.lower() in GUESSES["image"]
            if named and isinstance(value, str) and value.strip():
                row[name] = path.parent / value
    return rows


def _split(
    loaded: Loaded, head: str, spec: DataSpec, task: Task | None
) -> tuple[Split, Split, tuple[str, ...]]:
    """Return what is trained on, what is evaluated, and the names of the classes."""
    (inputs, labels), held = loaded.train, loaded.reported
    train_inputs = _checked_inputs(inputs, head, spec.source)
    held_inputs = None if held is None else _checked_inputs(held[0], head, "evaluation data")
    names: tuple[str, ...] = ()
    train_labels = held_labels = None
    if labels is not None:
        names, train_labels, held_labels = index_labels(
            labels, None if held is None else held[1], spec.source, task.classes if task else ()
        )
    train = Split(train_inputs, train_labels)
    if held_inputs is not None:
        reported = Split(held_inputs, held_labels)
    else:
        train, reported = hold_out(train, spec.eval_fraction, spec.seed, spec.source)
    return *choose(train, reported, spec.choice, spec.source), names


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
    known = _INPUTS.get(head, object)
    wrong = next((value for value in inputs if not isinstance(value, known)), None)
    if wrong is not None:
        raise DataError(
            f"data '{where}': the text column holds {type(wrong).__name__} ({str(wrong)[:40]!r}), "
            f"expected text. Choose another column with --text-column."
        )
    return inputs


# A tuple is a pair of texts.
_INPUTS: dict[str, Any] = {"lm": str, "classification": str | tuple, "instruct": Prompt}
