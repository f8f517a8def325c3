"""What a task is: data with a head, a metric, a source and a licence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradrank.core.errors import OptionError, nearest
from gradrank.lab.benchmarks.prompts import SCORINGS, Parse

Say = Callable[[str], None] | None
Columns = tuple[list[Any], list[Any] | None]


@dataclass(frozen=True, slots=True)
class Where:
    """Where a task may look for its data.

    Attributes:
        data_dir: A folder with public data, searched first; None: only ``GRADRANK_DATA``.
        say: Receives one line for each thing that takes time.
    """

    data_dir: str | None = None
    say: Say = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The data of a task as it came from its source.

    Attributes:
        train: Inputs and labels (None for ``lm`` and ``instruct``) of the training split.
        reported: The same of the split that the benchmark reports; None: a part of ``train`` is
            held out.
        notes: What a reader of a result must know, for the description of the data.
    """

    train: Columns
    reported: Columns | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: The name users give.
        head: ``lm``, ``classification``, ``image`` or ``instruct``.
        metric: The metric that counts, of :data:`gradrank.evidence.metrics.METRICS`.
        description: What is in it.
        source: Where it comes from.
        licence: Licence of the data.
        load: Reads or fetches the data. Inputs are texts, pairs of texts (tuples), pictures, or
            prompts.
        classes: Names of the classes in the order of their indices (class 1 is the positive one of
            F1); empty: the names that occur, in alphabetical order.
        parse: ``instruct`` only: finds the answer in what a model wrote, empty if there is none;
            None: answers are not generated.
        max_new_tokens: ``instruct`` only: longest answer that is generated, tokens.
        choices: ``instruct`` only: whether every item names its allowed answers, so that they can
            be scored by likelihood.
    """

    name: str
    head: str
    metric: str
    description: str
    source: str
    licence: str
    load: Callable[[Where], Loaded]
    classes: tuple[str, ...] = ()
    parse: Parse | None = None
    max_new_tokens: int = 32
    choices: bool = False


def check_scoring(scoring: str, name: str, head: str, choices: bool) -> None:
    """Refuse a way to find answers that a task does not allow.

    Args:
        scoring: The way; tasks that are not answered in words pass it over.
        name: Name of the task.
        head: Its head.
        choices: Whether all its items name their allowed answers.

    Raises:
        OptionError: If the way is unknown, or needs choices that are not there.
    """
    if scoring not in SCORINGS:
        raise OptionError(f"unknown scoring '{scoring}'. {nearest(scoring, SCORINGS)}")
    if scoring == "likelihood" and head == "instruct" and not choices:
        raise OptionError(
            f"task '{name}' has no fixed choices, so its answers cannot be scored by likelihood. "
            "Use scoring 'generate'."
        )
