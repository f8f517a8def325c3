"""What the "# Params (%)" of PiLoRA's tables say: which choices give them, and which shares follow.

Every figure is printed to two decimals, so it stands for an interval of width 0.01. A choice gives
a figure if its exact percentage lies in that interval; a share that follows from a figure is an
interval too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.pilora_parameters.shapes import Shape

from gradrank.core.targets import Target, cost_of_rank_one

HALF = 0.005
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Printed:
    """What the paper prints about one model.

    Attributes:
        model: Its name, as in :func:`benchmarks.pilora_parameters.shapes.build_shapes`.
        table: Where the figures stand.
        rank: Rank r of LoRA and of dominant neurons.
        supplementary_rank: Rank r' of the others.
        lora: "# Params (%)" of LoRA.
        pilora: That of PiLoRA.
        saving: Saving that the text states, per cent of LoRA's parameters, and half the width of
            the interval that its decimals leave.
        dora: That of DoRA.
        halves: That of PiLoRA with half of the neurons dominant.
        types: Targets that the paper's settings can be read as; empty: it names none.
    """

    model: str
    table: str
    rank: int
    supplementary_rank: int
    lora: float
    pilora: float
    saving: tuple[float, float]
    dora: float | None = None
    halves: float | None = None
    types: tuple[str, ...] = ()


_NAMED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
PRINTED = (
    Printed("LLaMA2-7B", "Tables 1, 4 and 5", 32, 2, 0.83, 0.63, (24, 0.5), None, 0.66, _NAMED),
    Printed("LLaMA3-8B", "Tables 1 and 5", 32, 2, 0.70, 0.55, (21.5, 0.05), 0.71, None, _NAMED),
    Printed("RoBERTa-large", "Tables 2 and 6", 8, 1, 4.00, 3.26, (18.5, 0.05), 4.00),
    Printed("CLIP ViT-B/32", "Tables 3 and 7", 8, 1, 1.49, 1.21, (19, 0.5), 1.49),
)


@dataclass(frozen=True)
class Choice:
    """One reading of a percentage.

    Attributes:
        types: Targets.
        basis: What it is taken of, in words.
        inside: Whether what is counted is also part of the denominator.
        head: Whether the trained task head is counted with the adapter.
        percent: The percentage of LoRA, exact; None until it is computed.
    """

    types: tuple[str, ...]
    basis: str
    inside: bool
    head: bool = False
    percent: float | None = field(default=None, compare=False)


def percent(parameters: int, basis: int, inside: bool) -> float:
    """Return trainable parameters in per cent.

    Args:
        parameters: Trainable parameters.
        basis: Parameters of the base model.
        inside: Whether the trainable ones are part of the denominator.

    Returns:
        Per cent.
    """
    return 100 * parameters / (basis + parameters * inside)


def gives(value: float, printed: float) -> bool:
    """Tell whether a value is printed as a figure with two decimals.

    Args:
        value: Exact value.
        printed: The figure.

    Returns:
        Whether it is, by rounding to the nearest; an exact tie may go either way.
    """
    return abs(value - printed) <= HALF + _ROUNDING


def lora_parameters(targets: Sequence[Target], rank: int) -> int:
    """Return the parameters of uniform LoRA.

    Args:
        targets: The targets.
        rank: Rank r.

    Returns:
        ``r Σ (n + m)``.
    """
    return rank * cost_of_rank_one(targets)


def pilora_parameters(
    targets: Sequence[Target], rank: int, supplementary_rank: int, share: float
) -> float:
    """Return the parameters of PiLoRA with some share of dominant neurons.

    Args:
        targets: The targets.
        rank: Rank r of dominant neurons.
        supplementary_rank: Rank r' of the others.
        share: Dominant neurons among all output neurons of all targets, 0 to 1. How they are
            spread over the targets makes no difference as long as both groups exist everywhere.

    Returns:
        ``Σ r (n + |M|) + r' (n + m - |M|)``, not rounded.

    Source:
        PiLoRA, section 3.3 (shapes of A_d, B_d, A_s, B_s).
    """
    n, m = sum(t.d_in for t in targets), sum(t.d_out for t in targets)
    return rank * (n + share * m) + supplementary_rank * (n + (1 - share) * m)


def share_of(
    targets: Sequence[Target], rank: int, supplementary_rank: int, parameters: float
) -> float:
    """Return the share of dominant neurons with which PiLoRA has so many parameters.

    Args:
        targets: The targets.
        rank: Rank r of dominant neurons.
        supplementary_rank: Rank r' of the others, below r.
        parameters: Trainable parameters.

    Returns:
        The share; outside 0 to 1 if no share gives so many.
    """
    none = pilora_parameters(targets, rank, supplementary_rank, 0.0)
    return (parameters - none) / (pilora_parameters(targets, rank, supplementary_rank, 1.0) - none)


def readings(shape: Shape, rank: int) -> Iterator[Choice]:
    """Yield every choice of targets and basis with the percentage that LoRA has under it.

    Args:
        shape: The model.
        rank: Rank r.

    Yields:
        Choices with their percentages.
    """
    for types in shape.choices():
        adapter = lora_parameters(shape.of_types(types), rank)
        for head in (False, True) if shape.head else (False,):
            for basis, size in shape.bases.items():
                for inside in (False, True):
                    value = percent(adapter + shape.head * head, size, inside)
                    yield Choice(types, basis, inside, head, value)


def implied_share(
    shape: Shape, choice: Choice, ranks: tuple[int, int], printed: float
) -> tuple[float, float, float]:
    """Return the share of dominant neurons that a printed percentage means under a choice.

    Args:
        shape: The model.
        choice: How the percentage is read.
        ranks: Ranks r and r'.
        printed: The figure.

    Returns:
        The least, the central and the greatest share.
    """
    targets, size = shape.of_types(choice.types), shape.bases[choice.basis]

    def at(value: float) -> float:
        part = value / 100
        counted = size * part / (1 - part) if choice.inside else size * part
        return share_of(targets, *ranks, counted - shape.head * choice.head)

    return at(printed - HALF), at(printed), at(printed + HALF)


def share_by_ratio(
    targets: Sequence[Target], ranks: tuple[int, int], ratios: tuple[float, float, float], rank: int
) -> tuple[float, float, float]:
    """Return the share that a ratio of PiLoRA's to LoRA's parameters means, whatever the basis.

    Args:
        targets: The targets.
        ranks: Ranks r and r' of PiLoRA.
        ratios: The least, the central and the greatest ratio.
        rank: Rank of the LoRA that it is compared with.

    Returns:
        The share for each ratio.
    """
    whole = lora_parameters(targets, rank)
    least, central, most = (share_of(targets, *ranks, ratio * whole) for ratio in ratios)
    return least, central, most


def printed_ratios(one: Printed, inside: bool) -> tuple[float, float, float]:
    """Return the ratios of PiLoRA's to LoRA's parameters that two printed figures leave possible.

    Args:
        one: What is printed.
        inside: Whether the adapter is part of the denominators, and so has to be taken out.

    Returns:
        The least, the central and the greatest ratio.
    """

    def weight(value: float) -> float:
        return value / (100 - value) if inside else value

    return (
        weight(one.pilora - HALF) / weight(one.lora + HALF),
        weight(one.pilora) / weight(one.lora),
        weight(one.pilora + HALF) / weight(one.lora - HALF),
    )


def stated_ratios(one: Printed) -> tuple[float, float, float]:
    """Return the same by the saving that the text states.

    Args:
        one: What is printed.

    Returns:
        The least, the central and the greatest ratio.
    """
    saving, half = one.saving
    return 1 - (saving + half) / 100, 1 - saving / 100, 1 - (saving - half) / 100
