"""What is asked about sizes, and the answer, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradrank.lab.compare.dry_arms import Footprint
from gradrank.lab.compare.dry_models import Outline
from gradrank.signals.measure import MeanGradient, Signal


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What the sizes depend on.

    Attributes:
        model: Folder with ``config.json``, a known name, or a hub name in the cache.
        head: ``lm``, ``classification``, ``image`` or ``instruct``; None: what the model has.
        method: Name of the method.
        options: Its options.
        budget: As the user wrote it.
        targets: As the user wrote it.
        signals: What is measured.
        batches: Mini-batches M.
        batch_size: Examples in a micro-batch.
        accumulate: Micro-batches in a mini-batch and in a training step.
        length: Tokens per example; None: 256, or less if the model has fewer positions.
        dtype: Of the base weights: ``float32``, ``bfloat16`` or ``float16``.
        bits: 4 or 8 for quantised weights, or None.
        gpu: Whether a GPU does the work: autocast to bfloat16 in training, fused attention also
            with drop-out, and statistics of batches kept on the host apart from it.
        checkpoint: Whether to measure with checkpointing; None: if ``max_memory`` asks for it.
        max_memory: Cap on what measuring holds beyond the model, bytes; None: no cap.
    """

    model: str
    head: str | None = None
    method: str = "gard"
    options: tuple[tuple[str, str], ...] = ()
    budget: str = "uniform:8"
    targets: str = "all-linear"
    signals: tuple[Signal, ...] = ()
    batches: int = 32
    batch_size: int = 8
    accumulate: int = 1
    length: int | None = None
    dtype: str = "float32"
    bits: int | None = None
    gpu: bool = False
    checkpoint: bool | None = None
    max_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters, and what the budget is.

    Attributes:
        base: Of the base model, with its head.
        targets: Number of targets.
        by_type: ``[number, parameters of their weights]`` by module type.
        budget: The budget in adapter parameters.
        share: The same as a share of the base model.
        uniform_rank: Rank of uniform LoRA at the budget; 0 if it does not reach rank 1 everywhere.
        rank_one: What rank 1 on every target costs.
        peak: The most that the method has in training at any moment.
        head: Parameters of a task head that is trained in full beside the adapter.
        adapter_bytes: Bytes of the saved adapter (float32), without its header.
    """

    base: int
    targets: int
    by_type: Mapping[str, tuple[int, int]]
    budget: int
    share: float
    uniform_rank: int
    rank_one: int
    peak: int
    head: int
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class Measuring:
    """Memory and work of measuring.

    Attributes:
        weights: Bytes of the base weights.
        activations: Bytes at the highest point of a forward and backward pass: what autograd and
            the probes keep, and temporaries.
        statistics: Bytes that sketches of the batches before hold on the device.
        workspace: Bytes for unpacking a quantised weight.
        device: Sum of these: the peak on the device.
        host: Bytes of statistics on the host (on a CPU they come on top of ``device``).
        stored: Bytes of ``measurement.safetensors``, without its header.
        passes: How often every mini-batch goes through the model.
        forward: FLOPs of all forward passes.
        backward: FLOPs of all backward passes.
        projections: FLOPs that the signals add.
        overhead: ``projections`` as a share of ``forward + backward``.
        checkpointed: Whether the model's blocks are computed again in the backward pass.
    """

    weights: int
    activations: int
    statistics: int
    workspace: int
    device: int
    host: int
    stored: int
    passes: int
    forward: int
    backward: int
    projections: int
    overhead: float
    checkpointed: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """Memory and work of a training step with uniform ranks at the budget.

    Attributes:
        weights: Bytes of the base weights.
        adapter: Bytes of the trained parameters.
        gradients: Bytes of their gradients.
        moments: Bytes of AdamW's moments.
        activations: As for measuring.
        workspace: As for measuring.
        device: Sum of these: the peak on the device.
        flops: FLOPs of an optimizer step, all its micro-batches.
    """

    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    workspace: int
    device: int
    flops: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model takes.

    Attributes:
        inquiry: What was asked.
        outline: The model.
        length: Tokens per example; 0 for pictures.
        parameters: Parameters.
        measuring: Measuring; None for a method that looks at no data beforehand.
        measuring_checkpointed: The same with checkpointing, where ``measuring`` is without it and
            nothing was asked for; else None.
        training: A training step.
        checkpointed: The same with gradient checkpointing; None where the model has none.
        footprint: What the method would train.
        packed: Bytes that the weights would have in 4 bits.
    """

    inquiry: Inquiry
    outline: Outline
    length: int
    parameters: Parameters
    measuring: Measuring | None
    training: Training
    checkpointed: Training | None
    footprint: Footprint
    packed: int
    measuring_checkpointed: Measuring | None = None

    @property
    def tokens(self) -> int:
        """Tokens (for pictures: examples) of all measured mini-batches."""
        asked = self.inquiry
        return asked.batches * asked.accumulate * asked.batch_size * (self.length or 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain data: bytes, FLOPs and numbers."""
        found = self.outline
        return {
            "model": {"name": found.name, "class": found.kind, "shapes": found.source},
            "dtype": self.inquiry.dtype,
            "quantised": self.inquiry.bits,
            "batch_size": self.inquiry.batch_size,
            "accumulate": self.inquiry.accumulate,
            "length": self.length,
            "batches": self.inquiry.batches,
            "signals": [_signal_name(signal) for signal in self.inquiry.signals],
            "parameters": asdict(self.parameters),
            "measuring": _plain(self.measuring),
            "measuring_checkpointed": _plain(self.measuring_checkpointed),
            "max_memory": self.inquiry.max_memory,
            "training": asdict(self.training),
            "checkpointed": _plain(self.checkpointed),
        }


def _plain(part: Measuring | Training | None) -> dict[str, Any] | None:
    return None if part is None else asdict(part)


def _signal_name(signal: Signal) -> str:
    if isinstance(signal, MeanGradient):
        return f"mean-gradient ({signal.directions} directions)"
    return f"spectrum ({signal.estimator})"
