"""The data of recipes fits their lengths: checked on the data itself where this machine has it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradrank.lab.assets import ASSETS, asset_folder
from gradrank.lab.compare.config import RunConfig
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.instruct import encode_prompts
from gradrank.lab.recipes import read
from gradrank.lab.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SMALL = [path for path in RECIPES if path.parent.name == "small"]
MODEL = "smollm2-135m"
# Those of the instruction tasks that the shared data has both splits of.
HERE = {"gsm8k", "boolq", "arc-e", "arc-c", "obqa"}
# Tokens of the longest training solution of GSM8K by SmolLM2's tokenizer, and of what stands beside
# it at least: one token of the question and the end. The test below counts them where it can.
LONGEST_SOLUTION = 454 + 2
ARTICLES = 60  # of WikiText-2's validation split


def instructed(path: Path) -> Iterator[RunConfig]:
    """Yield the settings of each instruction task of a recipe."""
    recipe = read(path)
    for task in recipe.tasks:
        config = recipe.config(task, recipe.variants[0])
        if config.task is not None and TASKS[config.task].head == "instruct":
            yield config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_room_for_the_longest_solution(path: Path) -> None:
    found = [config for config in instructed(path) if config.task == "gsm8k"]
    # None would be 256 tokens.
    assert [c.max_length for c in found if (c.max_length or 256) < LONGEST_SOLUTION] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_out_few_articles(path: Path) -> None:
    recipe = read(path)
    configs = [recipe.config(task, recipe.variants[0]) for task in recipe.tasks]
    # Where only the validation split can be had, it is what is trained on, and held out of.
    found = [config.validation for config in configs if config.task == "wikitext2"]
    assert [count for count in found if count > ARTICLES // 2] == []


def test_the_validation_split_has_as_many_articles_as_stated() -> None:
    if not (DATA / "wikitext2").is_dir():
        pytest.skip("needs the shared data")
    examples = read_examples(DataSpec("wikitext2", data_dir=str(DATA)))
    assert len(examples.train.inputs) == ARTICLES


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the tokenizer of the small recipes' decoder."""
    from transformers import AutoTokenizer  # slow to import

    folder = asset_folder(ASSETS[MODEL])
    if not (DATA / "gsm8k").is_dir() or not (folder / "tokenizer.json").is_file():
        pytest.skip("needs the shared data and the cached model")
    return AutoTokenizer.from_pretrained(folder)


def test_the_longest_solution_is_as_long_as_stated(tokenizer: Any) -> None:
    examples = read_examples(DataSpec("gsm8k", data_dir=str(DATA)))
    texts = [prompt.completion for prompt in examples.train.inputs]
    assert max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) == 454


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_instruction_tasks_of_small_recipes_can_be_encoded(path: Path, tokenizer: Any) -> None:
    for config in instructed(path):
        if config.model != MODEL or config.task not in HERE:
            continue
        for split in ("validation", "test"):
            if split == "validation" and not config.validation:
                continue
            examples = read_examples(
                DataSpec(
                    str(config.task),
                    split=split,
                    seed=config.data_seed,
                    validation=config.validation,
                    train_examples=config.train_examples,
                    eval_examples=config.eval_examples,
                    data_dir=str(DATA),
                )
            )
            for part in (examples.train, examples.eval):
                encoded = encode_prompts(part.inputs, tokenizer, config.max_length or 256)
                assert len(encoded) == len(part.inputs)
                assert max(map(len, encoded.ids)) <= (config.max_length or 256)
