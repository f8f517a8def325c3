"""Commonsense reasoning in eight data sets, by the protocol of LLM-Adapters.

Each item is an instruction that lists its choices; the model answers in words (``the correct answer
is answer2``), and the first allowed answer in them counts. Accuracy is by exact match; the mixture
is trained on all data sets at once and reported as the mean of their accuracies.

**Source**: Hu et al., LLM-Adapters, EMNLP 2023 (arXiv:2304.01933), section 3.1 and its data.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.find import VARIABLE, data_folders, find_file
from gradrank.lab.benchmarks.prompts import Prompt, instruction_prompt
from gradrank.lab.benchmarks.task import Loaded, Task, Where
from gradrank.lab.readers import Row, read_rows

MIXTURE = "commonsense-170k"
MIXTURE_FILE = "commonsense_170k.json"
_WORDS = "the correct answer is "


def _numbered(kind: str, count: int) -> tuple[str, ...]:
    return tuple(f"{kind}{number}" for number in range(1, count + 1))


# The answers that are looked for in what a model wrote: more than an item may offer.
FAMILIES: tuple[tuple[str, ...], ...] = (
    ("true", "false"),
    _numbered("solution", 2),
    _numbered("answer", 5),
    _numbered("ending", 4),
    _numbered("option", 2),
)
_FORMAT = re.compile(r"Answer format:\s*([^\s/]+(?:/[^\s/]+)+)\s*$")


@dataclass(frozen=True, slots=True)
class DataSet:
    """One of the eight.

    Attributes:
        folder: Its folder's name in the protocol's data.
        choices: The answers of an item that does not list its own.
        title: What it is.
        licence: Licence of its items.
    """

    folder: str
    choices: tuple[str, ...]
    title: str
    licence: str


def _data_set(
    folder: str, kind: str, count: int, title: str, licence: str = "see the data set"
) -> DataSet:
    return DataSet(folder, _numbered(kind, count), title, licence)


DATA_SETS: dict[str, DataSet] = {
    "boolq": DataSet("boolq", FAMILIES[0], "BoolQ, yes/no questions", "CC BY-SA 3.0"),
    "piqa": _data_set("piqa", "solution", 2, "PIQA, physical reasoning"),
    "siqa": _data_set("social_i_qa", "answer", 3, "SIQA, social reasoning"),
    "hellaswag": _data_set("hellaswag", "ending", 4, "HellaSwag, what happens next"),
    "winogrande": _data_set("winogrande", "option", 2, "WinoGrande, pronoun resolution"),
    "arc-e": _data_set("ARC-Easy", "answer", 4, "ARC, easy science questions", "CC BY-SA 4.0"),
    "arc-c": _data_set("ARC-Challenge", "answer", 4, "ARC, hard science questions", "CC BY-SA 4.0"),
    "obqa": _data_set("openbookqa", "answer", 4, "OpenBookQA, elementary science"),
}


def parse(text: str, prompt: Prompt) -> str:
    """Find the answer in what a model wrote: the first word of the data set's kind.

    Args:
        text: What was written.
        prompt: The item; the kind of its answer says what is looked for (``answer5`` counts as an
            answer, a wrong one, where an item offers four).

    Returns:
        The answer, or an empty text.
    """
    found = re.search("|".join(_family(prompt.answer)), text)
    return found.group() if found else ""


def load(name: str, where: Where, template: str = "plain") -> Loaded:
    """Read one data set.

    Args:
        name: A name in :data:`DATA_SETS`.
        where: Where to look.
        template: See :func:`gradrank.lab.benchmarks.prompts.instruction_prompt`.

    Returns:
        Prompts of the training and the test split.

    Raises:
        DataError: If a split is missing or malformed.
    """
    train, test = (read_split(name, split, where, template) for split in ("train", "test"))
    lacking = [split for split, found in (("train", train), ("test", test)) if found is None]
    if train is None or test is None:
        only = "" if len(lacking) == 2 else " Only the other split is there."
        fault = _missing(name, " and the ".join(lacking), where, DATA_SETS[name].folder, only)
        raise DataError(fault)
    return Loaded((train, None), (test, None))


def load_mixture(where: Where, template: str = "plain") -> Loaded:
    """Read the mixture of all training sets and the test sets, one group each.

    Args:
        where: Where to look.
        template: See :func:`gradrank.lab.benchmarks.prompts.instruction_prompt`.

    Returns:
        Prompts of both splits; notes name the data sets that are missing. Where the protocol's own
        file of the mixture is found, it is taken whole, and its items have no group.

    Raises:
        DataError: If there is nothing to train on or nothing to report, or a file is malformed.
    """
    notes = []
    path = find_file(where, _names(MIXTURE_FILE))
    if path is not None:
        train = _prompts(path, None, "", template, training=True)
    else:
        train, lacking = _gather("train", where, template)
        if lacking:
            notes.append(f"The training mixture lacks {', '.join(lacking)}.")
    test, untested = _gather("test", where, template)
    if untested:
        notes.append(f"The reported mean lacks {', '.join(untested)}.")
    if not train or not test:
        what = "train" if not train else "test"
        fault = _missing(MIXTURE, what, where, "<data set>", " No data set has it.")
        raise DataError(fault)
    if notes and where.say is not None:
        where.say(f"{MIXTURE}: {' '.join(notes)}")
    return Loaded((train, None), (test, None), tuple(notes))


def read_split(
    name: str, split: str, where: Where, template: str = "plain", group: str = ""
) -> list[Prompt] | None:
    """Read one split of one data set.

    Args:
        name: A name in :data:`DATA_SETS`.
        split: ``train`` or ``test``.
        where: Where to look.
        template: See :func:`gradrank.lab.benchmarks.prompts.instruction_prompt`.
        group: Group of its prompts.

    Returns:
        The prompts, or None if there is no such file.
    """
    path = find_file(where, _names(f"{DATA_SETS[name].folder}/{split}.json"))
    if path is None:
        return None
    return _prompts(path, DATA_SETS[name], group, template, training=split == "train")


def _gather(split: str, where: Where, template: str) -> tuple[list[Prompt], list[str]]:
    """Return the prompts of all data sets that are there, and the names of the others."""
    prompts: list[Prompt] = []
    lacking = []
    for name in DATA_SETS:
        found = read_split(name, split, where, template, group=name)
        if found is None:
            lacking.append(name)
        prompts.extend(found or ())
    return prompts, lacking


def _names(file: str) -> list[str]:
    return [f"commonsense/{file}", file]


def _prompts(
    path: Path, data: DataSet | None, group: str, template: str, training: bool
) -> list[Prompt]:
    rows = read_rows(path)
    if not rows:
        raise DataError(f"'{path}' is empty: it holds no items.")
    return [
        _prompt(row, f"'{path}' item {number}", data, group, template, training)
        for number, row in enumerate(rows, start=1)
    ]


def _prompt(
    row: Row, where: str, data: DataSet | None, group: str, template: str, training: bool
) -> Prompt:
    instruction, answer = (_text(row, key, where) for key in ("instruction", "answer"))
    family = _family(answer)
    expected = family if data is None else _family(data.choices[0])
    if not family or family != expected:
        known = ", ".join(expected) or "; ".join("/".join(names) for names in FAMILIES)
        raise DataError(f"{where} has the answer {answer!r}. Known: {known}.")
    choices = _choices(instruction) or (expected if data is None else data.choices)
    if answer not in choices:
        raise DataError(f"{where} has the answer '{answer}', but offers {', '.join(choices)}.")
    context = row.get("input")
    frame = instruction_prompt(
        instruction, context if isinstance(context, str) else "", template, training
    )
    return Prompt(frame, _WORDS + answer, answer, group, choices)


def _choices(instruction: str) -> tuple[str, ...]:
    """Return the answers that an instruction lists at its end; none if it lists none."""
    found = _FORMAT.search(instruction)
    choices = tuple(found.group(1).split("/")) if found else ()
    return choices if choices and set(choices) <= set(_family(choices[0])) else ()


def _family(answer: str) -> tuple[str, ...]:
    return next((names for names in FAMILIES if answer in names), ())


def _text(row: Row, key: str, where: str) -> str:
    value: Any = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has no text '{key}'. Each item needs 'instruction' and 'answer', as in the "
            f"files of LLM-Adapters."
        )
    return value if key == "instruction" else value.strip()


def _missing(task: str, split: str, where: Where, folder: str, note: str) -> str:
    places = " and ".join(f"'{path}'" for path in data_folders(where)) or "no folder (none given)"
    files = " or ".join(f"'commonsense/{folder}/{part}.json'" for part in split.split(" and the "))
    return (
        f"task '{task}' lacks the {split} split. Looked for {files} (or without 'commonsense/'; or "
        f"with '.gz') in {places}.{note} The LLM-Adapters repository on GitHub has these files: "
        f"the splits in its folder 'dataset', the mixture '{MIXTURE_FILE}' in 'ft-training_set'. "
        f"Put them in a folder and name it with --data-dir or {VARIABLE}."
    )


def _task(name: str, data: DataSet) -> Task:
    return Task(
        name=name,
        head="instruct",
        metric="accuracy",
        description=f"{data.title}; one of the eight commonsense data sets, answered in words.",
        source=f"LLM-Adapters data, {data.folder}",
        licence=data.licence,
        load=partial(load, name),
        parse=parse,
        choices=True,
    )


TASKS: tuple[Task, ...] = (
    *(_task(name, data) for name, data in DATA_SETS.items()),
    Task(
        name=MIXTURE,
        head="instruct",
        metric="accuracy",
        description="The mixture of the eight commonsense training sets; mean of eight accuracies.",
        source="LLM-Adapters data",
        licence="those of its parts",
        load=load_mixture,
        parse=parse,
        choices=True,
    ),
)
