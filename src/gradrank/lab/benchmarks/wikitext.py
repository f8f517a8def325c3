"""WikiText-2, language modelling on articles of an encyclopaedia."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.find import find_file, from_hub, offline
from gradrank.lab.benchmarks.task import Columns, Loaded, Task, Where
from gradrank.lab.hub import read_splits
from gradrank.lab.readers import read_lines

HUB = "Salesforce/wikitext:wikitext-2-v1"
_TITLE = re.compile(r"= [^=].* =")


def _files(split: str) -> list[str]:
    names = (f"{split}.txt", f"wiki.{split}.tokens")
    return [f"{folder}/{name}" for folder in ("wikitext2", "wikitext-2") for name in names]


def load(where: Where) -> Loaded:
    """Read WikiText-2 in its ``<unk>`` form.

    Args:
        where: Where to look.

    Returns:
        Articles of the training split and of the test split. Where a local folder has only the
        validation and the test split, the training split is taken from the hub, and without the hub
        the validation split is trained on; the notes say which.
    """
    train, valid, test = (find_file(where, _files(split)) for split in ("train", "valid", "test"))
    trained = train or valid
    if trained is None or test is None:
        wanted = " and ".join(f"'{_files(split)[0]}[.gz]'" for split in ("train", "test"))
        return from_hub("wikitext2", HUB, where, wanted, _from_hub)
    if train is not None:
        return Loaded(_local(train), _local(test))
    if not offline():
        if where.say is not None:
            where.say(f"the local folder lacks the training split; asking the hub for '{HUB}'")
        found = train_from_hub()
        if found is not None:
            note = "The training split is from the public hub, the test split from a local folder."
            return Loaded((list(found), None), _local(test), (note,))
    note = "Trained on the validation split: the training split is not there."
    return Loaded(_local(trained), _local(test), (note,))


@cache
def train_from_hub() -> tuple[str, ...] | None:
    """Return the articles of the hub's training split, or None where they cannot be had.

    The answer holds for the life of the process: without a network each try takes half a minute,
    and runs of one grid should not train on different splits.
    """
    try:
        (rows,) = read_splits(HUB, ("train",))
    except DataError:
        return None
    return tuple(articles(str(row["text"]) for row in rows))


def articles(lines: Iterable[str]) -> list[str]:
    """Part the lines of WikiText into articles.

    Args:
        lines: Lines; white space around them is left out.

    Returns:
        One text per article. It begins with the title, a line ``= Title =`` between empty lines.
    """
    found: list[list[str]] = [[]]
    stripped = [line.strip() for line in lines]
    for number, line in enumerate(stripped):
        alone = not any(stripped[max(number - 1, 0) : number]) and not any(
            stripped[number + 1 : number + 2]
        )
        if alone and _TITLE.fullmatch(line):
            found.append([])
        found[-1].append(line)
    texts = ("\n".join(part).strip() for part in found)
    return [f"{text}\n" for text in texts if text]


def _local(path: Path) -> Columns:
    return articles(read_lines(path)), None


def _from_hub() -> Loaded:
    train, test = (
        articles(str(row["text"]) for row in rows) for rows in read_splits(HUB, ("train", "test"))
    )
    return Loaded((train, None), (test, None))


WIKITEXT_TASKS = (
    Task(
        name="wikitext2",
        head="lm",
        metric="perplexity",
        description=(
            "Language modelling on WikiText-2; perplexity per token of the model's own tokenizer."
        ),
        source="Merity et al., Pointer Sentinel Mixture Models (2017)",
        licence="CC BY-SA 3.0",
        load=load,
    ),
)
