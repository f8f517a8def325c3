"""What the study of regimes measures: models, tasks, the point of the measurement, and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradrank.core.errors import GradrankError
from gradrank.lab.arms import head_modules
from gradrank.lab.compare.bench import Bench, Loaded, warm_head
from gradrank.lab.compare.config import RunConfig
from gradrank.session import measure
from gradrank.signals.measure import MeanGradient, Spectrum
from gradrank.signals.measurement import Measurement

RANK = 4
START = "start"


@dataclass(frozen=True, slots=True)
class Case:
    """One model on one task at one point, for several calibration seeds.

    Attributes:
        model: As ``gradrank.lab.models`` knows it.
        task: A registered task.
        head_steps: Steps for which the new head was trained alone first.
        adapter_steps: Steps for which a provisional adapter (rank 4, merged for the measuring) and
            the head were trained first; 0: the point of zero update.
        batch_size: Examples of a mini-batch.
        batches: Mini-batches.
        length: Longest sequence, tokens; None for pictures.
        seeds: Seeds, of the new head, the mini-batches and the sketches alike.
        lr: Learning rate of head and adapter.
    """

    model: str
    task: str
    head_steps: int = 0
    adapter_steps: int = 0
    batch_size: int = 8
    batches: int = 32
    length: int | None = 48
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 2e-3

    @property
    def point(self) -> str:
        """Where gradients are taken, in words."""
        if self.adapter_steps:
            return f"adapter {self.adapter_steps}"
        return f"head {self.head_steps}" if self.head_steps else START

    @property
    def name(self) -> str:
        """Name of the case, which tells it from every other."""
        size = f"{self.batches}x{self.batch_size}x{self.length or 'picture'}"
        return f"{self.model} {self.task} {self.point} {size}"

    def told(self) -> dict[str, Any]:
        """Return what the results say of the case; seeds are told by its passes."""
        return {
            "model": self.model,
            "task": self.task,
            "point": self.point,
            "batch_size": self.batch_size,
            "batches": self.batches,
            "length": self.length,
            "lr": self.lr,
        }

    def config(self) -> RunConfig:
        """Return the settings by which model and data are loaded."""
        return RunConfig(
            model=self.model,
            task=self.task,
            batch_size=self.batch_size,
            batches=self.batches,
            head_steps=self.head_steps,
            max_length=self.length,
            lr=self.lr,
            dtype="float32",
        )


def _cases() -> tuple[Case, ...]:
    """Return all cases, those that tell most per minute first."""
    texts, lm = ("sst2", "cola", "mrpc"), ("wikitext2", "movie-review-lm")
    small: dict[str, Any] = {"batch_size": 4, "batches": 16}
    points: dict[str, dict[str, Any]] = {
        "start": {},
        "head 20": {"head_steps": 20},
        "head 100": {"head_steps": 100},
        "adapter": {"adapter_steps": 60},
    }
    encoder = {
        at: [Case("minilm-l6", task, **point) for task in texts] for at, point in points.items()
    }
    pictures = [
        Case("dinov2-small-focus", "cifar10", head, length=None, **small) for head in (0, 100, 20)
    ]
    return (
        *encoder["start"],
        *encoder["head 100"],
        *(Case("smollm2-135m", task, **small) for task in lm),
        *pictures,
        *encoder["adapter"],
        *encoder["head 20"],
        Case("smollm2-135m", "boolq", length=160, **small),
        *(Case("smollm2-135m", task, adapter_steps=30, lr=1e-3, **small) for task in lm),
    )


CASES = _cases()
_TINY: dict[str, Any] = {"batch_size": 4, "batches": 8, "length": 16, "seeds": (0, 1)}
QUICK = (
    Case("tiny-bert", "tiny-sentiment", **_TINY),
    Case("tiny-bert", "tiny-sentiment", 3, **_TINY),
    Case("tiny-llama", "tiny-lm", **_TINY),
    Case("tiny-llama", "tiny-lm", adapter_steps=3, **_TINY),
)


@dataclass(frozen=True)
class Pass:
    """One calibration.

    Attributes:
        measurement: Spectrum over batches and mean gradient.
        loss: Mean loss at the point, over four further mini-batches.
    """

    measurement: Measurement
    loss: float


def kept(case: Case, seed: int, cache: Path) -> Path:
    """Return where a measurement is kept.

    Args:
        case: What is measured.
        seed: Which of its seeds.
        cache: Folder of measurements.
    """
    return cache / f"{case.name} seed {seed}.safetensors".replace(" ", "_")


def take(case: Case, seed: int, bench: Bench, cache: Path) -> Pass:
    """Measure, or read what was measured before.

    Args:
        case: What to measure.
        seed: Which of its seeds.
        bench: Loads models and data.
        cache: Folder of measurements.

    Returns:
        The calibration.
    """
    path = kept(case, seed, cache)
    if path.is_file():
        try:
            found = Measurement.load(path)
            return Pass(found, float(found.info["loss"]))
        except (GradrankError, KeyError):
            path.unlink()  # only a cache
    config = case.config()
    fresh = bench.load(config, "test", seed)
    model = _at_point(case, fresh, seed)
    loss = _loss(model, list(fresh.batches(4, case.batch_size, seed + 2)))
    found = measure(
        model,
        fresh.batches(case.batches, case.batch_size, seed),
        (Spectrum(), MeanGradient()),
        num_batches=case.batches,
        seed=seed,
    )
    found = Measurement(
        found.targets, found.spectrum, found.mean_gradient, {**found.info, "loss": loss}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path, overwrite=True)
    return Pass(found, loss)


def _at_point(case: Case, fresh: Loaded, seed: int) -> nn.Module:
    """Return the model at the point where gradients are wanted."""
    model: nn.Module = fresh.loaded.model
    head = head_modules(model)
    if head and case.head_steps:
        warm_head(fresh, case.config(), head, seed)
    if not case.adapter_steps:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        asked = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=list(head)
        )
        wrapped = get_peft_model(model, asked)  # pyright: ignore[reportArgumentType]
        chosen = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(chosen, lr=case.lr, weight_decay=0.0)
        for batch in fresh.batches(case.adapter_steps, case.batch_size, seed + 1):
            optimizer.zero_grad()
            wrapped(**batch).loss.backward()
            optimizer.step()
    return wrapped.merge_and_unload()


def _loss(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)
