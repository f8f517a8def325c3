"""What is known of a run's data without reading it: head, classes, size, and so its length."""

from dataclasses import dataclass

from gradrank.core.errors import OptionError, nearest
from gradrank.lab.benchmarks.task import Task
from gradrank.lab.compare.config import RunConfig
from gradrank.lab.models import HEADS, model_head
from gradrank.lab.tasks import find_task

# Classes of tasks that learn their names from the data.
CLASSES = {
    "movie-review-sentiment": 2,
    "tiny-sentiment": 2,
    "tiny-images": 3,
    "cars": 196,
    "dtd": 47,
    "eurosat": 10,
    "gtsrb": 43,
    "resisc45": 45,
    "sun397": 397,
    "svhn": 10,
    "cifar10": 10,
}
# Published sizes of training splits, or what is left where a tenth is held out. Language modelling
# counts blocks of tokens, which nobody knows before the tokenizer.
EXAMPLES = {
    "movie-review-sentiment": 9_065,
    "tiny-sentiment": 360,
    "tiny-images": 216,
    "cola": 8_551,
    "sst2": 67_349,
    "mrpc": 3_668,
    "qqp": 363_846,
    "mnli": 392_702,
    "mnli-mm": 392_702,
    "qnli": 104_743,
    "rte": 2_490,
    "boolq": 9_427,
    "piqa": 16_113,
    "siqa": 33_410,
    "hellaswag": 39_905,
    "winogrande": 63_238,
    "arc-e": 2_251,
    "arc-c": 1_119,
    "obqa": 4_957,
    "commonsense-170k": 170_420,
    "gsm8k": 7_473,
    "cars": 8_144,
    "dtd": 3_760,
    "eurosat": 21_600,
    "gtsrb": 26_640,
    "resisc45": 18_900,
    "sun397": 19_850,
    "svhn": 73_257,
    "cifar10": 50_000,
}
_USUAL_LENGTH = 256  # tokens, where a recipe names none


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is.

    Attributes:
        examples: Training examples, as far as they are known without the data; None: unknown.
        steps: Optimizer steps; None where they follow from data of unknown size.
        tokens: Tokens of training at most (texts are padded or cut to the longest); None for
            pictures and where the steps are unknown.
    """

    examples: int | None
    steps: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True)
class TaskOutline:
    """What is known of the data.

    Attributes:
        name: Task or data, as in the recipe.
        head: ``lm``, ``classification``, ``image`` or ``instruct``.
        metric: What is reported.
        classes: Number of classes; 2 where only the data would tell, 0 without classes.
        note: What was assumed; empty if nothing was.
    """

    name: str
    head: str
    metric: str
    classes: int
    note: str = ""


def task_outline(config: RunConfig) -> TaskOutline:
    """Return what is known of a run's data.

    Args:
        config: The run's settings.

    Raises:
        OptionError: If the task is unknown, or own data has no head.
    """
    if config.task is not None:
        task = find_task(config.task)
        if config.head not in {None, task.head}:
            raise OptionError(
                f"task '{task.name}' has the head '{task.head}', not '{config.head}'."
            )
        return _registered(task)
    head = config.head or ""
    if head not in HEADS:
        raise OptionError(
            f"data '{config.data}' needs 'head', and has {head or 'none'!r}. {nearest(head, HEADS)}"
        )
    classed = model_head(head) != "lm"
    metric = "accuracy" if classed else "eval_loss"
    note = "own data: its size is unknown" + (", and 2 classes are assumed" if classed else "")
    return TaskOutline(str(config.data), head, metric, 2 if classed else 0, note)


def _registered(task: Task) -> TaskOutline:
    if model_head(task.head) == "lm":
        return TaskOutline(task.name, task.head, task.metric, 0)
    classes = len(task.classes) or CLASSES.get(task.name, 0)
    note = "" if classes else "2 classes are assumed"
    return TaskOutline(task.name, task.head, task.metric, classes or 2, note)


def length(config: RunConfig, task: TaskOutline, limit: int | None) -> Length:
    """Return how long a run is.

    Args:
        config: The run's settings.
        task: Its task.
        limit: Longest sequence of the model, tokens; None without a limit.

    Raises:
        OptionError: If sequences are longer than the model's positions, or nothing is left to
            train on.
    """
    whole = EXAMPLES.get(task.name)
    examples = None if whole is None else whole - config.validation
    if examples is not None and examples < 1:
        raise OptionError(
            f"'validation' holds out {config.validation:,} examples, and task '{task.name}' has "
            f"{whole:,} to train on. Hold out fewer."
        )
    if config.train_examples is not None and task.head != "lm":
        examples = min(examples or config.train_examples, config.train_examples)
    steps: int | None = config.steps
    if config.epochs is not None:
        steps = None if examples is None else config.settings(0, examples).steps
    if task.head == "image":
        return Length(examples, steps, None)
    if config.max_length is not None and limit is not None and config.max_length > limit:
        raise OptionError(
            f"'max_length' is {config.max_length}, and model '{config.model}' has positions for "
            f"{limit} tokens. Choose at most {limit}."
        )
    row = config.max_length or min(_USUAL_LENGTH, limit or _USUAL_LENGTH)
    tokens = None if steps is None else steps * config.batch_size * config.accumulate * row
    return Length(examples, steps, tokens)
