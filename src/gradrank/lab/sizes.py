"""How large things are: bytes and floating-point operations from shapes alone, by formula.

Units: bytes, and FLOPs (a multiplication and an addition are two). T is the number of rows that a
target sees in one micro-batch (examples times tokens), k a sketch size, M the number of
mini-batches. What has no closed form that holds for every architecture (activations, and the
operations between the linear layers) is counted by :mod:`gradrank.lab.shapes` instead.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gradrank.core.errors import OptionError
from gradrank.core.targets import Target
from gradrank.ops.sketch import prime_at_least
from gradrank.signals.held import (
    DOUBLE,
    FLOAT,
    dense_blocks,
    mean_gradient_sizes,
    row_width,
)
from gradrank.signals.measure import Signal, Spectrum

# Adapters and AdamW's two moments are float32 whatever the base model's dtype is.
ADAM_MOMENTS = 2
# NF4 of bitsandbytes without double quantisation: half a byte, and a float32 per 64 weights.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter tensor of the base model.

    Attributes:
        rows: Its first dimension.
        numel: How many numbers it holds.
        linear: Whether quantisation would pack it: the weight of a linear layer besides the head.
    """

    rows: int
    numel: int
    linear: bool


def weight_bytes(weights: Iterable[Weight], itemsize: int, bits: int | None = None) -> int:
    """Return the bytes of the base model's weights.

    Args:
        weights: Its parameters, tied ones once.
        itemsize: Bytes per number of what is not quantised.
        bits: 4 (half a byte, and 4 bytes per 64 weights), 8 (a byte, and 4 bytes per row), or
            None for no quantisation. Embeddings, norms, biases and the head are never packed.

    Returns:
        Bytes.

    Raises:
        OptionError: If ``bits`` is neither 4 nor 8.

    Examples:
        >>> weight_bytes([Weight(2, 128, True), Weight(4, 4, False)], 2)
        264
        >>> weight_bytes([Weight(2, 128, True), Weight(4, 4, False)], 2, bits=4)
        80
    """
    if bits not in {None, 4, 8}:
        raise OptionError(f"quantised weights of {bits} bits are not known. Choose 4 or 8.")
    total = 0
    for weight in weights:
        if not weight.linear or bits is None:
            total += weight.numel * itemsize
        elif bits == 4:
            total += (weight.numel + 1) // 2 + FLOAT * -(-weight.numel // _BLOCK)
        else:
            total += weight.numel + FLOAT * weight.rows
    return total


def workspace_bytes(weights: Iterable[Weight], itemsize: int, bits: int | None) -> int:
    """Return the bytes that unpacking the largest quantised weight takes for a moment.

    Args:
        weights: Parameters of the base model.
        itemsize: Bytes per number of what is computed with.
        bits: As for :func:`weight_bytes`.

    Returns:
        Bytes; 0 without quantisation.
    """
    if bits is None:
        return 0
    return itemsize * max((weight.numel for weight in weights if weight.linear), default=0)


def training_state_bytes(parameters: int, itemsize: int = FLOAT) -> dict[str, int]:
    """Return what trainable parameters hold on the device between steps.

    Args:
        parameters: Trainable parameters.
        itemsize: Bytes per parameter.

    Returns:
        Bytes of ``adapter`` (the parameters themselves), ``gradients`` and ``moments`` (AdamW).

    Examples:
        >>> training_state_bytes(10)
        {'adapter': 40, 'gradients': 40, 'moments': 80}
    """
    own = parameters * itemsize
    return {"adapter": own, "gradients": own, "moments": ADAM_MOMENTS * own}


def spectrum_host_bytes(targets: Sequence[Target], signal: Spectrum, batches: int) -> int:
    """Return what the spectrum over batches holds in the host's memory at the end.

    Args:
        targets: The targets.
        signal: The request.
        batches: Mini-batches M.

    Returns:
        Bytes of the kept sketches (``4 M`` per number) and Gram matrices (``8 M²``); for dense
        gradients of the largest block of them, joined to one tensor for its Gram matrix.
    """
    gram = DOUBLE * batches**2 * len(targets)
    if signal.estimator == "sketch":
        kept = sum(row_width(target, signal.sketch_dim) for target in targets)
        return FLOAT * batches * kept + gram
    blocks = dense_blocks(targets, signal, batches)
    largest = max(sum(t.d_in * t.d_out for t in block) for block in blocks)
    joined = max(t.d_in * t.d_out for t in targets)
    return FLOAT * batches * (largest + joined) + gram


def stored_bytes(targets: Sequence[Target], signals: Sequence[Signal], batches: int) -> int:
    """Return the size of ``measurement.safetensors`` without its header.

    Args:
        targets: The targets.
        signals: What is measured.
        batches: Mini-batches M.

    Returns:
        Bytes of the tensors: Gram matrices, and singular values (and row factors) of the mean
        gradient for all batches and for each half of them.
    """
    total = 0
    for signal in signals:
        for target in targets:
            if isinstance(signal, Spectrum):
                total += DOUBLE * batches**2
                continue
            k = min(prime_at_least(signal.directions), target.max_rank)
            rows = FLOAT * target.d_out * k if signal.rows else 0
            total += 3 * (DOUBLE * k + rows)
    return total


def projection_flops(
    targets: Sequence[Target],
    signals: Sequence[Signal],
    rows: Mapping[str, int],
    inputs: Sequence[tuple[int, int]],
) -> tuple[int, int]:
    """Return what the signals add to one forward and backward pass.

    Args:
        targets: The targets.
        signals: What is measured.
        rows: T per target, as far as a gradient reaches it.
        inputs: ``(T, d_in)`` of every distinct input of targets (q, k and v share one).

    Returns:
        FLOPs of matrix products, and of folds (a sign and an addition per number).
    """
    products = folds = 0
    for signal in signals:
        dense = isinstance(signal, Spectrum) and signal.estimator == "dense"
        size = signal.sketch_dim if isinstance(signal, Spectrum) else signal.directions
        k = prime_at_least(size)
        folds += 0 if dense else sum(2 * count * width for count, width in inputs if width > k)
        for target in targets:
            count = rows.get(target.name, 0)
            if dense:
                products += 2 * count * target.d_in * target.d_out
                continue
            if isinstance(signal, Spectrum):
                products += 2 * count * min(target.d_in, k) * min(target.d_out, k)
                folded = target.d_out > k
            else:
                width, c = mean_gradient_sizes(target, signal.directions)
                products += 2 * count * (target.d_out * width + c * target.d_in)
                folded = target.d_out > c
            folds += 2 * count * target.d_out if folded else 0
    return products, folds


def linear_flops(shapes: Iterable[tuple[int, int]], rows: int) -> int:
    """Return the FLOPs of linear layers in one forward pass.

    Going back through frozen ones to their inputs costs the same again.

    Args:
        shapes: ``(d_in, d_out)`` of each.
        rows: T.

    Returns:
        ``2 T d_in d_out`` summed.

    Examples:
        >>> linear_flops([(3, 5)], 7)
        210
    """
    return sum(2 * rows * d_in * d_out for d_in, d_out in shapes)


def attention_flops(batch: int, heads: int, length: int, head_width: int) -> tuple[int, int]:
    """Return the FLOPs of one attention layer, scores that a causal mask hides included.

    Args:
        batch: Examples.
        heads: Heads of queries.
        length: Tokens per example.
        head_width: Features per head.

    Returns:
        FLOPs forward (``Q Kᵀ`` and scores times V) and backward (with the scores computed again,
        as kernels do that do not keep them: five products).
    """
    one = 2 * batch * heads * length * length * head_width
    return 2 * one, 5 * one


def seconds(flops: float, tflops: float) -> float:
    """Return how long work takes.

    Args:
        flops: FLOPs.
        tflops: Throughput that is really reached, 10¹² FLOPs per second.

    Returns:
        Seconds.

    Examples:
        >>> seconds(3e12, 2)
        1.5
    """
    return flops / (tflops * 1e12)
