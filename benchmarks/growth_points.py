"""Growth study: models with random weights along five axes, and what is done with them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradrank.session import measure
from gradrank.signals.layers import find_sites
from gradrank.signals.measure import MeanGradient, Spectrum
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer
from gradrank.signals.untouched import untouched

VARIANTS = ("bare", "sketch", "both")
"""Forward and backward passes alone; with the spectra; with spectra and mean gradients."""


@dataclass(frozen=True)
class Point:
    """One size in everything.

    Attributes:
        width: Width of a Llama-like decoder.
        layers: Its blocks, of 7 targets each.
        tokens: Tokens of a mini-batch, in four rows.
        batches: Mini-batches M.
        k: Sketch size.
    """

    width: int = 256
    layers: int = 4
    tokens: int = 256
    batches: int = 8
    k: int = 128

    @property
    def name(self) -> str:
        """The sizes in words, which tell a point from every other."""
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items())


@dataclass(frozen=True)
class Axes:
    """Points: one base, and values of each size while the others stay as in the base.

    Attributes:
        base: The base.
        values: By attribute of a point, its values.
        rounds: Times that variants take turns, where time is measured.
    """

    base: Point
    values: dict[str, tuple[int, ...]]
    rounds: int = 1

    def points(self) -> list[Point]:
        """Return every point once, the base first."""
        along = [
            replace(self.base, **{key: value})
            for key, values in self.values.items()
            for value in values
        ]
        return list(dict.fromkeys([self.base, *along]))


QUICK_AXES = Axes(
    Point(width=64, layers=1, tokens=32, batches=2, k=16), {"tokens": (32, 64)}, rounds=2
)


def model_of(point: Point) -> Any:
    """Return the model of a point, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=point.width,
        intermediate_size=point.width * 5 // 2,
        num_hidden_layers=point.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model.eval()


def batches_of(point: Point, count: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Return mini-batches of random tokens (cost does not depend on them)."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, point.tokens // 4)
    drawn = [
        torch.randint(0, 1024, shape, generator=generator) for _ in range(count or point.batches)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def do(variant: str, point: Point, model: Any, batches: Sequence[Any]) -> Measurement | None:
    """Take all mini-batches the way a variant does."""
    if variant == "bare":
        # The graph starts at the first target, as while measuring; nothing is gathered.
        with untouched(model, 0), Observer(find_sites(model), []):
            for batch in batches:
                model(**batch).loss.backward()
        return None
    signals = [Spectrum(sketch_dim=point.k), *([MeanGradient()] if variant == "both" else [])]
    return measure(model, batches, signals, num_batches=len(batches))
