"""What it costs to decide where capacity goes, side by side with what else could be used.

Usage: python -m benchmarks.bench_decide [--batches 8] [--repeats 2] [--quick]

The model is loaded and has taken one forward pass; then each tool does all that it needs until
its decision could be trained. Every turn is a process of its own; turns alternate repeat by
repeat. All get the same texts, and those with a number of batches the same number:

- gard, waterfill      ``gradrank.plan`` (reference: gard)
- dense                the same as gard with exact gradients (``estimator=dense``; by ``--ways``)
- peft-eva             PEFT: ranks and start from the inputs' variance
- peft-lora-ga         PEFT: start from the gradients' singular directions; ranks stay uniform
- aletheia             aletheia-lora as documented: norms per layer from 5 texts, one at a time
- aletheia, same data  the same over all the texts that the others get (by ``--ways``)
- gradience            audit of an adapter that is trained already, and ranks suggested from it
- gradience + training the same with the ``--adapter-steps`` of training that it needs before it
                       (by ``--ways``)

Peaks are those of the timed process with the system's allocator as it is, above what the process
held before the model was loaded: they tell factors apart, not per cent.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.frame import Bench, Found, Row, fresh, main, ratio_row
from benchmarks.setting import Batch, optimizer_of, peak_over, resident, stepper
from benchmarks.timing import ratio, timed
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import EvaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

import gradrank as gr
from benchmarks import peers
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.session import allocate, measure
from gradrank.signals.facts import find_targets

Decide = Callable[[argparse.Namespace, Any, list[Batch], Path], Row]


def ours(method: str, **options: Any) -> Decide:
    """Return how gradrank decides.

    Args:
        method: The method.
        **options: Its options.
    """

    def decide(args: argparse.Namespace, model: Any, batches: list[Batch], folder: Path) -> Row:
        chosen = gr.METHODS[method](**options)
        found = measure(model, batches, chosen.signals(), num_batches=len(batches))
        plan = allocate(found, chosen, f"uniform:{args.rank}")
        get_peft_model(model, plan.lora_config())
        found.save(folder / "measurement.safetensors")
        plan.save(folder / "plan.json")
        stored = sum(f.stat().st_size for f in folder.glob("measurement*"))
        return {"stored_bytes": stored, "decision_bytes": (folder / "plan.json").stat().st_size}

    return decide


def eva(args: argparse.Namespace, model: Any, batches: list[Batch], _folder: Path) -> Row:
    """Let PEFT's EVA redistribute the ranks, as its documentation shows."""
    config = LoraConfig(
        r=args.rank,
        target_modules="all-linear",
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    ranks: Any = wrapped.peft_config["default"].to_dict()["rank_pattern"]
    started = [p for n, p in wrapped.named_parameters() if ".lora_A." in n]
    stored = sum(p.numel() * p.element_size() for p in started)
    return {"stored_bytes": stored, "decision_bytes": len(json.dumps(ranks))}


def lora_ga(args: argparse.Namespace, model: Any, batches: list[Batch], _folder: Path) -> Row:
    """Let PEFT's LoRA-GA find its start, as its documentation shows."""
    # PEFT's annotations leave this start out.
    start: dict[str, Any] = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = LoraConfig(
        r=args.rank,
        # LoRA-GA looks the targets up before PEFT knows what "all-linear" stands for.
        target_modules=sorted({t.name.rpartition(".")[2] for t in find_targets(model)}),
        **start,
    )

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, train_step)
    fields = [getattr(m, "_peft_loraga_grad", None) for m in model.modules()]
    stored = sum(g.numel() * g.element_size() for g in fields if g is not None)
    get_peft_model(model, config)
    return {"stored_bytes": stored, "decision_bytes": 0}


def aletheia(texts: bool) -> Decide:
    """Return how aletheia-lora decides.

    Args:
        texts: Whether over all texts; else as many as it takes by default.
    """

    def decide(_args: argparse.Namespace, model: Any, batches: list[Batch], _folder: Path) -> Row:
        count = sum(len(batch["input_ids"]) for batch in batches)
        return peers.aletheia(model, batches, count if texts else None)

    return decide


def gradience(trained: bool) -> Decide:
    """Return how gradience decides.

    Args:
        trained: Whether the adapter is there already; else its training counts.
    """

    def decide(args: argparse.Namespace, model: Any, batches: list[Batch], folder: Path) -> Row:
        if not trained:
            train_adapter(args, model, batches, folder)
        return peers.gradience(folder)

    return decide


def train_adapter(args: argparse.Namespace, model: Any, batches: list[Batch], folder: Path) -> None:
    """Train uniform LoRA for a few steps and save it."""
    wrapped: Any = get_peft_model(model, LoraConfig(r=args.rank, target_modules="all-linear"))
    step = stepper(wrapped, optimizer_of(wrapped))
    for number in range(args.adapter_steps):
        step(batches[number % len(batches)])
    wrapped.save_pretrained(folder)


WAYS: dict[str, Decide] = {
    "gard": ours("gard"),
    "waterfill": ours("waterfill"),
    "dense": ours("gard", estimator="dense"),
    "peft-eva": eva,
    "peft-lora-ga": lora_ga,
    "aletheia": aletheia(False),
    "aletheia, same data": aletheia(True),
    "gradience": gradience(True),
    "gradience + training": gradience(False),
}
DEFAULT = ("gard", "waterfill", "peft-eva", "peft-lora-ga", "aletheia", "gradience")
NOTES = {
    "peft-lora-ga": "decides a start, no ranks",
    "peft-eva": "reads inputs alone, goes through the texts until its directions stand still",
    "aletheia": "chooses half of the layers, no ranks; 5 texts, one at a time",
    "gradience": "the training of the adapter that it reads is not counted",
}


def part(args: argparse.Namespace, name: str) -> Row:
    """Decide once in this process.

    Args:
        args: The flags.
        name: The way.

    Returns:
        Its seconds, its peak memory, and the bytes that it needs to keep.
    """
    before = resident()
    model, batches = prepared(args)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if name == "gradience":
            train_adapter(args, model, batches, folder)
            model, batches = prepared(args)
        with torch.no_grad():
            model(**batches[0])
        found: list[Any] = []
        peak = peak_over(
            lambda: found.extend(timed(lambda: WAYS[name](args, model, batches, folder))), before
        )
    return {"seconds": found[0], **found[1], **peak}


def prepared(args: argparse.Namespace) -> tuple[Any, list[Batch]]:
    """Return a fresh model, and batches of real text."""
    loaded = resolve_model(args.model, "lm")
    data = load_task_data(read_examples(DataSpec(args.task)), loaded, args.length)
    items: Any = data.train
    device = next(loaded.model.parameters()).device
    batches = []
    for start in range(0, args.batches * args.batch, args.batch):
        batch = data.collate([items[i] for i in range(start, start + args.batch)])
        batches.append({key: value.to(device) for key, value in batch.items()})
    return loaded.model, batches


def run(args: argparse.Namespace) -> Found:
    """Let all ways take turns, each in a process of its own."""
    ways = list(dict.fromkeys(["gard", *args.ways]))
    skipped = {name: why for name in ways if (why := peers.missing(name.split(",")[0].split()[0]))}
    names = [name for name in ways if name not in skipped]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rows: dict[str, Row] = {}
    for repeat in range(args.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            found = fresh("decide", args, name)
            seconds[name].append(found.pop("seconds"))
            rows[name] = found
    for name in names:
        base = ratio(seconds[name], seconds["gard"])
        rows[name] = ratio_row(base, statistics.mean(seconds[name]), "gard") | rows[name]
        if name in NOTES:
            rows[name]["note"] = NOTES[name]
    return Found({name: rows[name] for name in names}, skipped)


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rank", type=int, default=8, help="uniform rank of the budget")
    parser.add_argument("--task", default="movie-review-lm")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--adapter-steps", type=int, default=30, help="training before gradience")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(DEFAULT))


BENCH = Bench(
    name="decide",
    about="Whole cost of deciding ranks: gradrank beside PEFT's initialisations and two peers.",
    minutes=5,
    run=run,
    flags=flags,
    quick={
        "rank": 4,
        "task": "tiny-lm",
        "batches": 4,
        "repeats": 1,
        "adapter_steps": 3,
    },
    part=part,
    columns=("seconds", "ratio", "range", "peak_bytes", "stored_bytes", "decision_bytes", "note"),
)

if __name__ == "__main__":
    main(BENCH)
