"""Commonsense data: template, parsing and files in the public schema."""

import gzip
import json
from pathlib import Path

import pytest

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks import commonsense
from gradrank.lab.benchmarks.commonsense import DATA_SETS, MIXTURE, load, load_mixture, parse
from gradrank.lab.benchmarks.prompts import Prompt, instruction_prompt
from gradrank.lab.benchmarks.task import Where

ANSWERS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "siqa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "arc-e": ("answer1", "answer2", "answer3", "answer4"),
    "arc-c": ("answer1", "answer2", "answer3", "answer4"),
    "obqa": ("answer1", "answer2", "answer3", "answer4"),
}
BLANKS = "                "  # sixteen


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADRANK_DATA", raising=False)


def row(name: str, number: int, **changes) -> dict:
    """An item in the public form."""
    answers = ANSWERS[name]
    answer = answers[number % len(answers)]
    return {
        "instruction": f"Question {number} of {name}?\n\nAnswer format: {'/'.join(answers)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
        **changes,
    }


def write(path: Path, rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def fill(root: Path, names=tuple(DATA_SETS), splits=("train", "test"), suffix=".json.gz") -> Where:
    for name in names:
        for split in splits:
            rows = [row(name, number) for number in range(3 if split == "train" else 2)]
            write(root / DATA_SETS[name].folder / f"{split}{suffix}", rows)
    return Where(str(root))


def of(answer: str) -> Prompt:
    return Prompt("", f"the correct answer is {answer}", answer)


def test_template_without_and_with_input():
    assert instruction_prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Do it.\n"
        "\n"
        "### Response:\n"
    )
    assert instruction_prompt("Do it.", "This.") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Do it.\n"
        "\n"
        "### Input:\n"
        "This.\n"
        "\n"
        "### Response:\n"
    )
    assert instruction_prompt("x", training=True) == instruction_prompt("x")


def test_published_layouts():
    assert instruction_prompt("Do it.", template="published") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request. \n"
        "\n"
        f"{BLANKS}### Instruction:\n"
        f"{BLANKS}Do it.\n"
        "\n"
        f"{BLANKS}### Response:\n"
        f"{BLANKS}"
    )
    assert instruction_prompt("Do it.", template="published", training=True) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.  # noqa: E501\n"
        "\n"
        f"{BLANKS}### Instruction:\n"
        f"{BLANKS}Do it.\n"
        f"{BLANKS}\n"
        f"{BLANKS}### Response:\n"
        f"{BLANKS}"
    )
    with_input = instruction_prompt("Do it.", "This.", template="published")
    assert "completes the request.\n\n" in with_input
    assert f"{BLANKS}### Input:\n{BLANKS}This.\n\n{BLANKS}### Response:\n{BLANKS}" in with_input
    trained = instruction_prompt("Do it.", "This.", template="published", training=True)
    assert f"request.  # noqa: E501\n\n{BLANKS}### Instruction:" in trained
    with pytest.raises(OptionError, match="Did you mean 'plain'"):
        instruction_prompt("x", template="plian")


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("true", "the correct answer is true", "true"),
        ("true", "true or false? false", "true"),  # the first counts
        ("true", "\n falsehoods", "false"),  # within a word too
        ("true", "True", ""),  # case counts
        ("true", "yes", ""),
        ("true", "", ""),
        ("solution1", "the correct answer is solution2.", "solution2"),
        ("solution1", "solution3", ""),
        ("solution1", "solution 1", ""),
        ("answer2", "the correct answer is answer4\n\n### Instruction: answer1", "answer4"),
        ("answer2", "answer5", "answer5"),  # looked for whatever the item offers
        ("answer2", "answer6", ""),
        ("answer2", "answer12", "answer1"),
        ("answer2", "the correct answer is option1 or answer3", "answer3"),
        ("ending4", "ending3 ending4", "ending3"),
        ("ending4", "ending5", ""),
        ("option1", "the correct answer is option2</s>", "option2"),
        ("option1", "answer1", ""),
    ],
)
def test_first_answer_of_the_kind_counts(answer, text, found):
    assert parse(text, of(answer)) == found


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_each_data_set_is_read(tmp_path, suffix):
    where = fill(tmp_path / "commonsense", suffix=suffix)
    for name, answers in ANSWERS.items():
        for place in (where, Where(str(tmp_path))):
            loaded = load(name, place)
            train, labels = loaded.train
            assert (len(train), labels, loaded.notes) == (3, None, ())
            assert len(loaded.reported[0]) == 2
            item = train[1]
            assert item.prompt == instruction_prompt(row(name, 1)["instruction"])
            assert item.completion == f"the correct answer is {answers[1]}"
            assert (item.answer, item.group, item.choices) == (answers[1], "", answers)
            assert parse(item.completion, item) == item.answer
            assert [item.completed(choice) for choice in item.choices] == [
                f"the correct answer is {choice}" for choice in answers
            ]


def test_choices_are_those_that_the_item_lists(tmp_path):
    five = "Q?\n\nAnswer format: answer1/answer2/answer3/answer4/answer5"
    rows = [
        row("arc-e", 0, instruction=five, answer="answer5"),
        row("arc-e", 0, instruction="Q? No list."),
        row("arc-e", 0, instruction="Q?\n\nAnswer format: answer1/answer2 "),
        row("arc-e", 0, instruction="Q?\n\nAnswer format: this/that"),
    ]
    for split in ("train", "test"):
        write(tmp_path / "ARC-Easy" / f"{split}.json", rows)
    choices = [item.choices for item in load("arc-e", Where(str(tmp_path))).reported[0]]
    four = ANSWERS["arc-e"]
    assert choices == [(*four, "answer5"), four, ("answer1", "answer2"), four]


def test_input_of_an_item_is_in_its_prompt(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "boolq" / f"{split}.json", [row("boolq", 0, input="A passage.")])
    (item,) = load("boolq", Where(str(tmp_path))).train[0]
    assert "### Input:\nA passage.\n" in item.prompt


def test_data_set_without_training_split_is_refused(tmp_path):
    where = fill(tmp_path, ["piqa"], ["test"])
    with pytest.raises(DataError) as refused:
        load("piqa", where)
    told = str(refused.value)
    assert "task 'piqa' lacks the train split" in told
    assert "'commonsense/piqa/train.json'" in told
    assert f"in '{tmp_path}'" in told
    assert "LLM-Adapters repository" in told
    assert "--data-dir or GRADRANK_DATA" in told


def test_data_set_that_is_nowhere_is_refused():
    with pytest.raises(DataError, match=r"'siqa' lacks the train and the test split.*no folder"):
        load("siqa", Where())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([row("boolq", 0), row("boolq", 1, answer="maybe")], "item 2 has the answer 'maybe'"),
        ([row("boolq", 0, answer="answer1")], "Known: true, false"),
        ([row("boolq", 0, answer=None)], "item 1 has no text 'answer'"),
        ([row("boolq", 0, instruction=" ")], "item 1 has no text 'instruction'"),
        ([row("boolq", 0, answer=1)], "item 1 has no text 'answer'"),
        ({"instruction": "a"}, "must hold a JSON list"),
    ],
)
def test_malformed_items_are_named(tmp_path, rows, message):
    write(tmp_path / "boolq" / "train.json", rows)
    write(tmp_path / "boolq" / "test.json", [row("boolq", 0)])
    with pytest.raises(DataError, match=message):
        load("boolq", Where(str(tmp_path)))


def test_answer_that_the_item_does_not_offer_is_refused(tmp_path):
    odd = row("siqa", 0, answer="answer5")
    for split in ("train", "test"):
        write(tmp_path / "social_i_qa" / f"{split}.json", [odd])
    with pytest.raises(DataError, match="'answer5', but offers answer1, answer2, answer3"):
        load("siqa", Where(str(tmp_path)))


def test_mixture_joins_what_is_there_and_names_what_is_not(tmp_path):
    fill(tmp_path / "commonsense", ["boolq", "arc-e"])
    fill(tmp_path / "commonsense", ["piqa"], ["test"])
    said: list[str] = []
    loaded = load_mixture(Where(str(tmp_path), said.append))
    assert [item.group for item in loaded.train[0]] == ["boolq"] * 3 + ["arc-e"] * 3
    assert [item.group for item in loaded.reported[0]] == (
        ["boolq"] * 2 + ["piqa"] * 2 + ["arc-e"] * 2
    )
    assert loaded.notes == (
        "The training mixture lacks piqa, siqa, hellaswag, winogrande, arc-c, obqa.",
        "The reported mean lacks siqa, hellaswag, winogrande, arc-c, obqa.",
    )
    assert said == [f"{MIXTURE}: {loaded.notes[0]} {loaded.notes[1]}"]


def test_whole_mixture_has_no_notes(tmp_path):
    where = fill(tmp_path)
    assert load_mixture(where).notes == ()
    assert {item.group for item in load_mixture(where).reported[0]} == set(DATA_SETS)


@pytest.mark.parametrize("name", ["commonsense_170k.json", "commonsense/commonsense_170k.json.gz"])
def test_file_of_the_mixture_is_taken_whole(tmp_path, name):
    fill(tmp_path)
    rows = [row(name, 1) for name in ("boolq", "hellaswag", "siqa")]
    rows.append(row("arc-e", 1, instruction="No list."))
    write(tmp_path / name, rows)
    loaded = load_mixture(Where(str(tmp_path)))
    train = loaded.train[0]
    assert [item.answer for item in train] == ["false", "ending2", "answer2", "answer2"]
    assert train[2].choices == ("answer1", "answer2", "answer3")
    assert train[3].choices == ("answer1", "answer2", "answer3", "answer4", "answer5")
    assert all(item.group == "" for item in train)
    assert len(loaded.reported[0]) == 16
    assert loaded.notes == ()


def test_mixture_without_anything_to_train_on_is_refused(tmp_path):
    where = fill(tmp_path, splits=["test"])
    with pytest.raises(DataError, match=r"'commonsense-170k' lacks the train split.*No data set"):
        load_mixture(where)


def test_training_and_test_frames_follow_the_template(tmp_path):
    loaded = load("boolq", fill(tmp_path, ["boolq"]), "published")
    assert "# noqa" in loaded.train[0][0].prompt
    assert "# noqa" not in loaded.reported[0][0].prompt
    assert loaded.reported[0][0].prompt.endswith(f"\n{BLANKS}")


def test_tasks_read_their_own_data(tmp_path):
    where = fill(tmp_path)
    tasks = {task.name: task for task in commonsense.TASKS}
    assert set(tasks) == {*DATA_SETS, MIXTURE}
    for name, task in tasks.items():
        assert (task.head, task.metric, task.max_new_tokens) == ("instruct", "accuracy", 32)
        item = task.load(where).reported[0][0]
        assert task.parse(item.completion, item) == item.answer
        if name != MIXTURE:
            assert item.choices == ANSWERS[name]


def test_every_item_has_choices_as_the_tasks_say(tmp_path: Path) -> None:
    where = fill(tmp_path)
    for task in commonsense.TASKS:
        loaded = task.load(where)
        assert loaded.reported is not None
        assert task.choices
        assert all(
            prompt.choices for split in (loaded.train, loaded.reported) for prompt in split[0]
        )
