"""GSM8K: grade-school mathematics, answered by reasoning that ends in a number.

**Source**: Cobbe et al., Training Verifiers to Solve Math Word Problems (arXiv:2110.14168), the
data and the ``####`` before the final number.
"""

import re
from decimal import Decimal, InvalidOperation

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.find import find_file, from_hub
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.benchmarks.task import Loaded, Task, Where
from gradrank.lab.hub import read_splits
from gradrank.lab.readers import Row, read_rows

NAME = "gsm8k"
HUB = "openai/gsm8k:main"
SPLITS = ("train", "test")
_MARKED = re.compile(r"####\s*(-?\s*\$?\s*[0-9.,]+)")
# A minus sign after a digit or a bracket subtracts; a comma belongs to a number only where it
# groups three digits.
_NUMBER = re.compile(
    r"(?:(?<![0-9)\]])-)?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def parse(text: str, _prompt: Prompt | None = None) -> str:
    """Find the final number: the first after ``####``, else the last of the text.

    Args:
        text: What was written.

    Returns:
        The number in normal form, or an empty text.

    Examples:
        >>> parse("She pays 3 * $400 = $1,200.00. #### 1,200.00")
        '1200'
        >>> parse("That makes 7 apples.")
        '7'
    """
    marked = _MARKED.search(text)
    number = normal_number(marked.group(1)) if marked else ""
    if number:
        return number
    found = _NUMBER.findall(text)
    return normal_number(found[-1]) if found else ""


def normal_number(text: str) -> str:
    """Write a number in its normal form.

    Args:
        text: A decimal number, perhaps with a dollar sign, commas, blanks, a point at its end.

    Returns:
        Digits without needless zeros, with a minus sign if it is below zero; an empty text if it is
        no number.

    Examples:
        >>> normal_number("$1,200.50")
        '1200.5'
    """
    digits = re.sub(r"[$,\s]", "", text).rstrip(".")
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return ""
    plain = format(number, "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    negative = plain.startswith("-")
    plain = plain.lstrip("-").lstrip("0")
    plain = f"0{plain}" if not plain or plain.startswith(".") else plain
    return f"-{plain}" if negative and plain != "0" else plain


def load(where: Where) -> Loaded:
    """Read the data from a local folder, else from the public hub.

    Args:
        where: Where to look.

    Returns:
        Prompts of the training and the test split.
    """
    paths = {
        split: find_file(where, [f"{NAME}/{split}.jsonl", f"{NAME}/{split}.json"])
        for split in SPLITS
    }
    present = {split: path for split, path in paths.items() if path is not None}
    if len(present) == len(SPLITS):
        found = {split: (f"'{path}'", read_rows(path)) for split, path in present.items()}
    else:
        wanted = f"'{NAME}/train.jsonl' and '{NAME}/test.jsonl' (or with '.gz')"
        if present:
            wanted += f"; found {', '.join(present)} only"
        splits = from_hub(NAME, HUB, where, wanted, lambda: read_splits(HUB, SPLITS))
        found = {
            name: (f"the split '{name}' of '{HUB}'", rows)
            for name, rows in zip(SPLITS, splits, strict=True)
        }
    train, test = (_prompts(rows, place) for place, rows in (found[split] for split in SPLITS))
    return Loaded((train, None), (test, None))


def _prompts(rows: list[Row], place: str) -> list[Prompt]:
    if not rows:
        raise DataError(f"{place} is empty: it holds no items.")
    prompts = []
    for number, row in enumerate(rows, start=1):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise DataError(f"{place}, item {number} needs the texts 'question' and 'answer'.")
        marked = _MARKED.search(answer)
        final = normal_number(marked.group(1)) if marked else ""
        if not final:
            raise DataError(
                f"{place}, item {number} has no final number after '####' in its answer: "
                f"{answer[-60:]!r}."
            )
        prompts.append(Prompt(f"Question: {question}\nAnswer:", f" {answer}", final))
    return prompts


TASKS: tuple[Task, ...] = (
    Task(
        name=NAME,
        head="instruct",
        metric="accuracy",
        description="GSM8K: word problems, answered by reasoning; exact match of the final number.",
        source="Cobbe et al., 2021 (openai/gsm8k)",
        licence="MIT",
        load=load,
        parse=parse,
        max_new_tokens=256,
    ),
)
