"""GLUE: what a sentence or a pair of them says. The development split is reported.

The labels of GLUE's test splits are not public; a split for choosing hyper-parameters comes out of
the training data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.find import find_file, from_hub
from gradrank.lab.benchmarks.task import Columns, Loaded, Task, Where
from gradrank.lab.hub import read_splits
from gradrank.lab.readers import Row, read_lines

# Published files hold a few broken lines; more of them mean that it is another file.
MOST_BROKEN = 0.01


@dataclass(frozen=True, slots=True)
class Form:
    """How one task is laid out in its public files.

    Attributes:
        name: The task.
        metric: GLUE's own metric.
        about: What it asks.
        classes: Class names, class 1 the positive one; files with numbers use these indices.
        texts: Columns of the texts in the TSV files.
        label: Column of the label there.
        hub_texts: Columns of the texts on the hub.
        folder: Name of the folder in the official archive.
        config: Configuration on the hub; empty: the name.
        dev: Name of the development file without its ending.
        hub_dev: The same on the hub.
        header: Column names of files that have no header.
        source: Where the data comes from.
        dev_only: Another place of a development file that may be there without a training file.
    """

    name: str
    metric: str
    about: str
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    hub_texts: tuple[str, ...]
    folder: str
    source: str
    config: str = ""
    dev: str = "dev"
    hub_dev: str = "validation"
    header: tuple[str, ...] = ()
    dev_only: str = ""

    def files(self, stem: str) -> list[str]:
        """Return where a file may stand, relative to a data folder.

        Args:
            stem: Its name without the ending.
        """
        names = (self.config or self.name, self.folder)
        return [f"{top}{name}/{stem}.tsv" for top in ("glue/", "", "GLUE/") for name in names]


def load(form: Form, where: Where) -> Loaded:
    """Read a task of GLUE from a local folder, or else from the hub.

    Args:
        form: Its layout.
        where: Where to look.

    Returns:
        Training and development split.
    """
    train = find_file(where, form.files("train"))
    held = find_file(where, [*form.files(form.dev), *([form.dev_only] if form.dev_only else [])])
    if train is not None and held is not None:
        read = [read_table(path, form) for path in (train, held)]
        notes = tuple(note for _, note in read if note)
        return Loaded(read[0][0], read[1][0], notes)
    there = train or held
    lacks = "training" if train is None else "development"
    found = f"; only '{there}' is there, so the {lacks} split is missing" if there else ""
    wanted = (
        f"'{form.files('train')[0]}[.gz]' and '{form.files(form.dev)[0]}[.gz]' (official columns)"
        f"{found}"
    )
    hub = f"nyu-mll/glue:{form.config or form.name}"
    return from_hub(form.name, hub, where, wanted, partial(_from_hub, form, hub))


def read_table(path: Path, form: Form) -> tuple[Columns, str]:
    """Read a TSV file of GLUE. Quotes are ordinary characters there.

    Args:
        path: The file, or one compressed with gzip.
        form: Its layout.

    Returns:
        Texts (or pairs) with class names, and a note if broken lines were left out.

    Raises:
        DataError: If a column is missing, or more than 1 % of the lines are broken.
    """
    lines = read_lines(path)
    header = list(form.header) if form.header else lines[0].split("\t") if lines else []
    absent = [name for name in (*form.texts, form.label) if name not in header]
    if absent:
        raise DataError(
            f"'{path}' has no column '{absent[0]}'. Columns: {', '.join(header)[:200] or 'none'}. "
            f"It must be the official file of GLUE's task '{form.name}'."
        )
    rows = lines if form.header else lines[1:]
    places = [header.index(name) for name in (*form.texts, form.label)]
    inputs, labels, broken = [], [], []
    for number, line in enumerate(rows, start=1 if form.header else 2):
        cells = line.split("\t")
        found = [cells[place].strip() for place in places] if len(cells) >= len(header) else []
        name = _class_name(found[-1], form) if found and all(found) else None
        if name is None:
            broken.extend([number] if line.strip() else [])
            continue
        inputs.append(_joined(found[:-1]))
        labels.append(name)
    if len(broken) > MOST_BROKEN * len(rows) or not inputs:
        raise DataError(
            f"'{path}': {len(broken)} of {len(rows)} lines lack a text or a known label, the first "
            f"is line {broken[0] if broken else 1}. Labels: {', '.join(form.classes)}. Is it the "
            f"official file of GLUE's task '{form.name}'?"
        )
    note = f"{len(broken)} broken line(s) of '{path.name}' were left out." if broken else ""
    return (inputs, labels), note


def _from_hub(form: Form, hub: str) -> Loaded:
    train, held = read_splits(hub, ("train", form.hub_dev))
    return Loaded(_hub_columns(train, form, hub), _hub_columns(held, form, hub))


def _hub_columns(rows: list[Row], form: Form, hub: str) -> Columns:
    wanted = (*form.hub_texts, "label")
    absent = [name for name in wanted if rows and name not in rows[0]]
    if absent or not rows:
        raise DataError(f"data set '{hub}' has no rows with the columns {', '.join(wanted)}.")
    inputs: list[Any] = [
        _joined([str(row[name]).strip() for name in form.hub_texts]) for row in rows
    ]
    labels = [_class_name(str(row["label"]), form) for row in rows]
    return inputs, labels


def _class_name(label: str, form: Form) -> str | None:
    if label in form.classes:
        return label
    if label.isascii() and label.isdigit() and int(label) < len(form.classes):
        return form.classes[int(label)]
    return None


def _joined(texts: list[str]) -> Any:
    return texts[0] if len(texts) == 1 else tuple(texts)


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_MNLI = "Williams et al., Multi-Genre Natural Language Inference (2018)"

FORMS = (
    Form(
        name="cola",
        metric="mcc",
        about="whether an English sentence is grammatical",
        classes=("unacceptable", "acceptable"),
        texts=("sentence",),
        label="label",
        hub_texts=("sentence",),
        folder="CoLA",
        source="Warstadt et al., Corpus of Linguistic Acceptability (2019)",
        header=("source", "label", "star", "sentence"),
    ),
    Form(
        name="sst2",
        metric="accuracy",
        about="sentiment of phrases of film reviews",
        classes=("negative", "positive"),
        texts=("sentence",),
        label="label",
        hub_texts=("sentence",),
        folder="SST-2",
        source="Socher et al., Stanford Sentiment Treebank (2013)",
    ),
    Form(
        name="mrpc",
        metric="accuracy_f1",
        about="whether two sentences of the news say the same",
        classes=("not_equivalent", "equivalent"),
        texts=("#1 String", "#2 String"),
        label="Quality",
        hub_texts=_PAIR,
        folder="MRPC",
        source="Dolan and Brockett, Microsoft Research Paraphrase Corpus (2005)",
    ),
    Form(
        name="qqp",
        metric="accuracy_f1",
        about="whether two questions ask the same",
        classes=("not_duplicate", "duplicate"),
        texts=("question1", "question2"),
        label="is_duplicate",
        hub_texts=("question1", "question2"),
        folder="QQP",
        source="Quora Question Pairs (2017)",
    ),
    Form(
        name="mnli",
        metric="accuracy",
        about="whether a premise entails a hypothesis, genres as in training (matched)",
        classes=_NLI,
        texts=_PAIR,
        label="gold_label",
        hub_texts=("premise", "hypothesis"),
        folder="MNLI",
        source=_MNLI,
        dev="dev_matched",
        hub_dev="validation_matched",
    ),
    Form(
        name="mnli-mm",
        metric="accuracy",
        about="the same on genres that training has not (mismatched)",
        classes=_NLI,
        texts=_PAIR,
        label="gold_label",
        hub_texts=("premise", "hypothesis"),
        folder="MNLI",
        source=_MNLI,
        config="mnli",
        dev="dev_mismatched",
        hub_dev="validation_mismatched",
    ),
    Form(
        name="qnli",
        metric="accuracy",
        about="whether a sentence answers a question",
        classes=_ENTAILED,
        texts=("question", "sentence"),
        label="label",
        hub_texts=("question", "sentence"),
        folder="QNLI",
        source="Rajpurkar et al., SQuAD (2016), in the form of GLUE",
        dev_only="glue/qnli_dev_only.tsv",
    ),
    Form(
        name="rte",
        metric="accuracy",
        about="whether a text entails a sentence",
        classes=_ENTAILED,
        texts=_PAIR,
        label="label",
        hub_texts=_PAIR,
        folder="RTE",
        source="Dagan et al., Recognizing Textual Entailment 1, 2, 3 and 5 (2006-2009)",
    ),
)


def _task(form: Form, loader: Callable[[Where], Loaded]) -> Task:
    return Task(
        name=form.name,
        head="classification",
        metric=form.metric,
        description=f"GLUE: {form.about}.",
        source=f"{form.source}; GLUE, Wang et al. (2019)",
        licence="research use; see the task",
        load=loader,
        classes=form.classes,
    )


GLUE_TASKS = tuple(_task(form, partial(load, form)) for form in FORMS)
