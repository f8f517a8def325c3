"""How many bytes statistics hold while they are gathered, by formula.

k is a sketch size, M the number of mini-batches.
"""

from collections.abc import Sequence

from gradrank.core.targets import Target
from gradrank.ops.sketch import prime_at_least
from gradrank.signals.requests import MeanGradient, Signal, Spectrum
from gradrank.signals.spectrum import STORED_WIDTH

FLOAT, DOUBLE = 4, 8


def row_width(target: Target, sketch_dim: int) -> int:
    """Return how many numbers of a batch's gradient the spectrum keeps.

    Args:
        target: The target.
        sketch_dim: Sketch size that was asked for.

    Returns:
        ``min(min(d_in, k) min(d_out, k), 1024)``.
    """
    k = prime_at_least(sketch_dim)
    return min(min(target.d_in, k) * min(target.d_out, k), STORED_WIDTH)


def mean_gradient_sizes(target: Target, directions: int) -> tuple[int, int]:
    """Return the widths of the two sketches of the mean gradient.

    Args:
        target: The target.
        directions: Directions that were asked for.

    Returns:
        Columns of ``Y [d_out, k]`` and rows of ``W [c, d_in]``.
    """
    k = prime_at_least(directions)
    return min(k, target.d_in), min(prime_at_least(2 * k + 1), target.d_out)


def mean_gradient_bytes(targets: Sequence[Target], signal: MeanGradient) -> int:
    """Return the bytes of one set of the mean gradient's sketches, float32.

    Two such sets (even and odd batches) stay on the device.

    Args:
        targets: The targets.
        signal: The request.

    Returns:
        ``4 (d_out k + c d_in)`` summed over targets.
    """
    total = 0
    for target in targets:
        k, c = mean_gradient_sizes(target, signal.directions)
        total += target.d_out * k + c * target.d_in
    return FLOAT * total


def weights(targets: Sequence[Target]) -> int:
    """Return how many weights the targets have together."""
    return sum(target.d_in * target.d_out for target in targets)


def dense_blocks(targets: Sequence[Target], signal: Spectrum, batches: int) -> list[list[Target]]:
    """Return the blocks of targets whose dense gradients are kept at once, one pass for each.

    Args:
        targets: The targets.
        signal: The request, with its ``max_bytes``; a single target may exceed them.
        batches: Mini-batches M.

    Returns:
        The blocks, in model order.
    """
    # Float32 gradients of all mini-batches, and one more while a block is joined.
    limit = signal.max_bytes // (FLOAT * (batches + 1))
    blocks: list[list[Target]] = [[]]
    used = 0
    for target in targets:
        size = weights([target])
        if blocks[-1] and used + size > limit:
            blocks.append([])
            used = 0
        blocks[-1].append(target)
        used += size
    return blocks


def statistics_bytes(
    targets: Sequence[Target], signals: Sequence[Signal], batches: int, on_host: bool
) -> int:
    """Return what statistics hold on the model's device while a pass goes on.

    Args:
        targets: The targets of the pass.
        signals: What is measured in it.
        batches: Mini-batches M.
        on_host: Whether the model is in the host's memory, where what is kept of each batch is.

    Returns:
        Bytes.
    """
    total = 0
    for signal in signals:
        if isinstance(signal, MeanGradient):
            total += min(2, batches) * mean_gradient_bytes(targets, signal)
            continue
        dense = signal.estimator == "dense"
        one = weights(targets) if dense else sum(row_width(t, signal.sketch_dim) for t in targets)
        # Rows of all mini-batches, and the one that is being measured or joined.
        total += FLOAT * one * (batches + 1 if on_host else 1)
        total += DOUBLE * batches**2 * len(targets) if on_host else 0
    return total
