"""Do two tasks of a grid share their texts? What stands in both is not two pieces of evidence.

Usage: python -m benchmarks.study_overlap [RECIPE] [--data-dir DIR]

For every pair of text tasks of the recipe, with the recipe's own choice of examples: how many
evaluated examples of the one are evaluated or trained on in the other, letter for letter but for
case, spaces and punctuation. And within each task: how many of the examples that rates are chosen
on are trained on as well. Nothing is trained.
"""

import argparse
from itertools import permutations
from pathlib import Path

from gradrank.lab.compare.bench import Bench
from gradrank.lab.recipes import read
from gradrank.lab.splits import Split

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description="Texts that tasks of a recipe share")
    default = ROOT / "recipes" / "small" / "encoder.yaml"
    parser.add_argument("recipe", type=Path, nargs="?", default=default)
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    recipe = read(arguments.recipe)
    bench = Bench(Path(), arguments.data_dir)
    read_of: dict[str, dict[str, Split]] = {}
    for task in recipe.tasks:
        config = recipe.config(task, recipe.variants[0])
        reported, chosen = (bench.examples(config, split) for split in ("test", "validation"))
        read_of[task.label] = {
            "trained on": reported.train,
            "evaluated": reported.eval,
            "held out for rates": chosen.eval,
        }
    for name, splits in read_of.items():
        for what in ("evaluated", "held out for rates"):
            print(said(name, what, splits[what], name, "trained on", splits["trained on"]))
    for one, other in permutations(read_of, 2):
        for what in ("evaluated", "trained on"):
            split = read_of[other][what]
            print(said(one, "evaluated", read_of[one]["evaluated"], other, what, split))


def said(one: str, what: str, first: Split, other: str, where: str, second: Split) -> str:
    """Return one count in words.

    Args:
        one: A task.
        what: What its split is for.
        first: The split.
        other: The other task.
        where: What its split is for.
        second: The split.
    """
    there = {same(text) for text in second.inputs}
    count = sum(same(text) in there for text in first.inputs)
    return f"{one}, {what}: {count} of {len(first.inputs)} are {where} in {other}"


def same(text: object) -> str:
    """Return what texts have in common that differ in case, spaces and punctuation only.

    One source writes "it 's", the other "it's".

    Args:
        text: A text, or a pair of texts.
    """
    parts = text if isinstance(text, tuple) else (text,)
    return "\t".join("".join(filter(str.isalnum, str(part).lower())) for part in parts)


if __name__ == "__main__":
    main()
