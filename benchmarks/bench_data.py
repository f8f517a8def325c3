"""What gradrank's way of training adds to transformers' Trainer, and what grouping takes away.

Usage: python -m benchmarks.bench_data [--steps 20] [--repeats 6] [--quick]

Uniform LoRA is trained by the Trainer alone and by what ``gradrank train`` calls, on the same
encoded data, in the same order, with the same settings: once on full blocks of text (language
modelling) and once on texts of various lengths (classification), there with ``--group-by-length``
too. Whole trainings take turns. Counted is the time from the end of the first step to the end of
the last, so that neither loading nor the last evaluation has a part in it. Grouped batches hold
other texts in a step, so they are compared by seconds per token, padding not counted.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.frame import Bench, Found, Goal, Row, main, ratio_row
from benchmarks.timing import ratio, synchronise
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import TaskData, load_task_data
from gradrank.lab.models import resolve_model
from gradrank.lab.train import TrainSettings, train

TASK_TYPES = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
GOALS = (
    Goal("uniform LoRA, blocks", "lm, gradrank", "ratio", 1.0, "the Trainer alone"),
    Goal("uniform LoRA, texts", "texts, gradrank", "ratio", 1.0, "the Trainer alone"),
)


@dataclass(frozen=True)
class Timed:
    """What one training gave: seconds of each step but the first, tokens of all, with padding."""

    seconds: list[float]
    tokens: int
    positions: int

    @property
    def per_token(self) -> float:
        """Seconds per token that is no padding."""
        return sum(self.seconds) / self.tokens


class Ends(TrainerCallback):
    """The times at which steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def note(self, *_: Any) -> None:
        """Take the time; also what ``train`` calls after each step."""
        synchronise()
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.note()

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step but the first."""
        return [late - early for early, late in zip(self.times, self.times[1:], strict=False)]


Prepared = Callable[[], tuple[Any, TaskData]]


def prepare(name: str, task: str, args: argparse.Namespace) -> Prepared:
    """Encode the data once; return what gives a fresh model with uniform LoRA, and the data."""
    examples = read_examples(DataSpec(task))
    classes = len(examples.label_names) or None
    data: list[TaskData] = []

    def fresh() -> tuple[Any, TaskData]:
        torch.manual_seed(0)
        loaded = resolve_model(name, examples.head, classes, label_names=examples.label_names)
        if not data:
            length = args.length if examples.head == "lm" else None
            data.append(load_task_data(examples, loaded, length))
        config = LoraConfig(
            r=args.rank, target_modules="all-linear", task_type=TASK_TYPES[examples.head]
        )
        return get_peft_model(loaded.model, config), data[0]

    return fresh


def alone(prepared: Prepared, args: argparse.Namespace) -> Timed:
    """Train through the Trainer alone."""
    model, data = prepared()
    ends, counted = Ends(), _Counted(data.collate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=2e-4,
            lr_scheduler_type="linear",
            seed=0,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_drop_last=True,
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        before = model.config.use_cache
        model.config.use_cache = False
        trainer = Trainer(
            model, arguments, train_dataset=data.train, data_collator=counted, callbacks=[ends]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.config.use_cache = before
    sizes = counted.sizes[1 : args.steps]
    return Timed(ends.seconds, sum(s[0] for s in sizes), sum(s[1] for s in sizes))


class _Counted:
    """Counts tokens of each batch that is made, without and with padding."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, items: list[Any]) -> Any:
        batch = self._collate(items)
        lengths = [len(item["input_ids"]) for item in items]
        self.sizes.append((sum(lengths), batch["input_ids"].numel()))
        return batch


def ours(prepared: Prepared, args: argparse.Namespace, grouped: bool = False) -> Timed:
    """Train as ``gradrank train --method uniform`` does."""
    model, data = prepared()
    ends, counted = Ends(), _Counted(data.collate)
    watched = TaskData(**{**vars(data), "collate": counted})
    settings = TrainSettings(
        steps=args.steps, batch_size=args.batch, group_by_length=grouped, max_eval_batches=1
    )
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(model, watched, settings, Path(folder), on_progress=ends.note)
    assert outcome.status == "finished", outcome.message
    sizes = counted.sizes[1 : args.steps]
    return Timed(ends.seconds, sum(s[0] for s in sizes), sum(s[1] for s in sizes))


def run(args: argparse.Namespace) -> Found:
    """Let the variants take turns on either kind of data."""
    rows: dict[str, Row] = {}
    kinds = {"lm": (args.model, args.lm_task), "texts": (args.text_model, args.text_task)}
    for kind, (model, task) in kinds.items():
        prepared = prepare(model, task, args)
        ways: dict[str, Callable[[], Timed]] = {
            "Trainer alone": lambda p=prepared: alone(p, args),
            "gradrank": lambda p=prepared: ours(p, args),
        }
        if kind == "texts":
            ways["gradrank, grouped"] = lambda p=prepared: ours(p, args, grouped=True)
        found = _turns(ways, args.repeats)
        rows |= {f"{kind}, {name}": row for name, row in _rows(kind, found).items()}
    return Found(
        rows,
        notes=[
            "Texts that are padded may be grouped by length; several of them in one row are not "
            "offered, since few architectures would keep them from seeing one another. Language "
            "modelling has full blocks, in which a document sees those before it."
        ],
    )


def _turns(ways: dict[str, Callable[[], Timed]], repeats: int) -> dict[str, list[Timed]]:
    names = list(ways)
    found: dict[str, list[Timed]] = {name: [] for name in names}
    for way in ways.values():  # thread pools, allocator, caches
        way()
    for number in range(repeats):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            found[name].append(ways[name]())
    return found


def _rows(kind: str, found: dict[str, list[Timed]]) -> dict[str, Row]:
    base = found["Trainer alone"]
    rows: dict[str, Row] = {}
    for name, taken in found.items():
        mine, theirs = ([s for t in part for s in t.seconds] for part in (taken, base))
        row = ratio_row(ratio(mine, theirs), sum(mine) / len(mine), f"{kind}, Trainer alone")
        tokens = ratio([t.per_token for t in taken], [t.per_token for t in base])
        row["microseconds_per_token"] = 1e6 * sum(t.per_token for t in taken) / len(taken)
        row["ratio_per_token"] = tokens.value
        row["interval_per_token"] = list(tokens.interval) if tokens.interval else None
        real, all_of_them = (sum(getattr(t, k) for t in taken) for k in ("tokens", "positions"))
        row["padding"] = 1 - real / all_of_them
        rows[name] = row
    return rows


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own flags."""
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--repeats", type=int, default=6, help="trainings of each kind")
    parser.add_argument("--text-model", default="minilm-l6")
    parser.add_argument("--lm-task", default="movie-review-lm")
    parser.add_argument("--text-task", default="movie-review-sentiment")


BENCH = Bench(
    "data",
    "Uniform LoRA through gradrank and through the Trainer alone; batches grouped by length.",
    15,
    run,
    flags,
    {
        "steps": 4,
        "repeats": 1,
        "text_model": "tiny-bert",
        "lm_task": "tiny-lm",
        "text_task": "tiny-sentiment",
    },
    goals=GOALS,
    columns=(
        "seconds",
        "ratio",
        "interval",
        "microseconds_per_token",
        "ratio_per_token",
        "interval_per_token",
        "padding",
    ),
)

if __name__ == "__main__":
    main(BENCH)
