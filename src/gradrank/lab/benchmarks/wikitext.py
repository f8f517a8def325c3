"""WikiText-2, language modelling on articles of an encyclopaedia."""

import re
from collections.abc import Iterable
from pathlib import Path

from gradrank.lab.benchmarks.find import find_file, from_hub
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
        Articles of the training split and of the test split. A local folder without the training
        split is trained on its validation split; the notes say so.
    """
    train, valid, test = (find_file(where, _files(split)) for split in ("train", "valid", "test"))
    trained = train or valid
    if trained is None or test is None:
        wanted = " and ".join(f"'{_files(split)[0]}[.gz]'" for split in ("train", "test"))
        return from_hub("wikitext2", HUB, where, wanted, _from_hub)
    notes = () if train else ("Trained on the validation split: the training split is not there.",)
    return Loaded(_local(trained), _local(test), notes)


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
