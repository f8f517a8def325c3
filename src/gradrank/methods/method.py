"""What a method is: options, the signals it needs, scores, and ranks within a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Protocol, get_args, runtime_checkable

from gradrank.allocation.capacities import RowSplit
from gradrank.core.errors import MeasurementError, OptionError, nearest
from gradrank.core.partition import Capacity
from gradrank.core.targets import Target
from gradrank.signals.mean_gradient import WHOLE
from gradrank.signals.measure import MAX_SKETCH, Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True)
class Assessment:
    """What a method makes of a measurement.

    Attributes:
        scores: One number per target, 0 or more; larger deserves more capacity.
        gains: For methods that price each direction: gain of rank 1, 2, ... per target. Unit:
            the method's own; None for methods that only score.
        details: Further columns per target for the plan, plain data.
        splits: For methods that also price neuron partitions: ways to split a target's output
            rows, in the unit of ``gains``.
    """

    scores: Mapping[str, float]
    gains: Mapping[str, Sequence[float]] | None = None
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    splits: Mapping[str, Sequence[RowSplit]] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """A way to decide where capacity goes; a frozen dataclass whose fields are its options.

    A method lives in one file of this package and one line of the registry. It must be
    deterministic, must not depend on the order of the targets, and must keep the budget.

    Attributes:
        name: As in the registry.
        summary: One line for listings.
        source: Paper and section or equation, or "gradrank".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]

    def signals(self) -> tuple[Signal, ...]:
        """Return what must be measured; empty for methods that look at no data."""
        ...

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return scores (and gains) of the targets."""
        ...

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return a rank per target, zeros included, within ``budget`` parameters."""
        ...


@runtime_checkable
class CapacityMethod(Method, Protocol):
    """A method that gives some targets a neuron partition instead of one rank for all rows.

    :meth:`Method.ranks` then gives the rank of the stock LoRA that holds each capacity, from which
    the parameters do not follow.
    """

    def capacities(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, Capacity]:
        """Return a rank or a partition per target, within ``budget`` parameters."""
        ...


def by_effective_rank(
    targets: Sequence[Target],
    measurement: Measurement,
    energy: float,
    centring: bool,
    fractional: bool = False,
) -> Assessment:
    """Return GARD's scores: effective ranks, normalised.

    Args:
        targets: The targets.
        measurement: Measurement with the spectrum signal.
        energy: Threshold of the effective rank.
        centring: Whether to remove the mean gradient first.
        fractional: Whether to read effective ranks between the whole numbers.

    Returns:
        Scores that sum to 1, and per target the effective rank and its saturation, the share of
        the largest effective rank that M batches allow, ``ceil(energy * M)``.

    Source:
        GARD, section 3.2.
    """
    spectrum = measurement.need_spectrum()
    found = spectrum.effective_ranks(energy, centring)
    scored = spectrum.fractional_ranks(energy, centring) if fractional else found
    ceiling = math.ceil(energy * measurement.batches - 1e-9)
    return Assessment(
        normalised({target.name: scored[target.name] for target in targets}),
        details={
            target.name: {
                "effective_rank": found[target.name],
                "saturation": found[target.name] / ceiling,
            }
            for target in targets
        },
    )


def by_direction(
    name: str, targets: Sequence[Target], measurement: Measurement | None
) -> Assessment:
    """Return what each direction of the mean gradient is worth: its energy.

    Args:
        name: Name of the method, for messages.
        targets: The targets.
        measurement: Measurement with the mean-gradient signal.

    Returns:
        Gains per direction (squared singular values), their sums as scores, and per target with
        any energy the column ``top_energy_share``, the share of its first direction.

    Raises:
        MeasurementError: If nothing was measured, or every gradient is zero.
    """
    if measurement is None:
        raise MeasurementError(f"method '{name}' needs a measurement; none was given.")
    values = measurement.need_mean_gradient().values[WHOLE]
    gains = {target.name: values[target.name].square().tolist() for target in targets}
    scores = {target: sum(energies) for target, energies in gains.items()}
    if not any(scores.values()):
        raise MeasurementError(
            f"the mean gradient of all {len(targets)} targets is zero, so that there is nothing to "
            "allocate by. Check the labels and the loss."
        )
    shares = {n: {"top_energy_share": gains[n][0] / score} for n, score in scores.items() if score}
    return Assessment(scores, gains, shares)


def normalised(values: Mapping[str, float]) -> dict[str, float]:
    """Return values as shares of their sum.

    Args:
        values: Numbers of 0 or more by target name.

    Returns:
        The shares.

    Raises:
        MeasurementError: If all are zero.
    """
    total = sum(values.values())
    if total == 0:
        raise MeasurementError(
            f"all {len(values)} targets have a zero gradient, so that there is nothing to allocate "
            "by. Check the labels and the loss."
        )
    return {name: value / total for name, value in values.items()}


def option(default: Any, text: str) -> Any:
    """Return a dataclass field that is an option with a help text.

    Args:
        default: Its default.
        text: What it does, with its unit and range.

    Returns:
        The field.
    """
    return field(default=default, metadata={"help": text})


def describe_options(method: type) -> list[dict[str, Any]]:
    """Return a method's options for listings.

    Args:
        method: The method's class.

    Returns:
        Per option: ``name``, ``default``, ``type`` and ``help``.
    """
    return [
        {
            "name": item.name,
            "default": None if item.default is MISSING else item.default,
            "type": " or ".join(_type_names(item)),
            "help": item.metadata.get("help", ""),
        }
        for item in fields(method)
    ]


def build(method: type, options: Mapping[str, Any]) -> Any:
    """Build a method from options as users write them (text or plain values).

    Args:
        method: The method's class.
        options: Values by option name; text is converted to the option's type.

    Returns:
        The method.

    Raises:
        OptionError: If an option is unknown or its value has the wrong type or range.
    """
    known = {item.name: item for item in fields(method)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) if known else "It has no options."
            raise OptionError(f"method '{method.name}' has no option '{name}'. {hint}")
        values[name] = _convert(method.name, known[name], value)
    return method(**values)


def require(ok: bool, method: str, name: str, value: Any, rule: str) -> None:
    """Refuse an option's value.

    Args:
        ok: Whether the value is legal.
        method: Name of the method.
        name: Name of the option.
        value: The value.
        rule: What is legal, for the message.

    Raises:
        OptionError: If ``ok`` is false.
    """
    if not ok:
        raise OptionError(f"option '{name}' of method '{method}' is {value!r}; it must be {rule}.")


def check_rank_bounds(method: str, r_min: int, r_max: int | None) -> None:
    """Refuse impossible rank bounds.

    Args:
        method: Name of the method.
        r_min: Smallest rank of every target.
        r_max: Largest rank, or None.
    """
    require(r_min >= 0, method, "r_min", r_min, "0 or more")
    legal = r_max is None or r_max >= max(r_min, 1)
    require(legal, method, "r_max", r_max, f"at least r_min = {r_min} and at least 1")


def check_sketch(method: str, name: str, size: int) -> None:
    """Refuse a sketch that is empty or larger than any gradient needs.

    Args:
        method: Name of the method.
        name: Name of the option.
        size: Its value.
    """
    require(1 <= size <= MAX_SKETCH, method, name, size, f"in 1..{MAX_SKETCH}")


def _type_names(item: "Field[Any]") -> list[str]:
    kinds = get_args(item.type) or (item.type,)
    return ["none" if kind is NoneType else getattr(kind, "__name__", str(kind)) for kind in kinds]


def _convert(method: str, item: "Field[Any]", value: Any) -> Any:
    """Convert a value to an option's type, refusing what would lose information."""
    kinds = _type_names(item)
    text = value.strip() if isinstance(value, str) else value
    if "none" in kinds and (value is None or str(text).lower() in {"none", "null"}):
        return None
    if "bool" in kinds and (
        isinstance(value, bool) or str(text).lower() in {"true", "false", "yes", "no", "1", "0"}
    ):
        return str(text).lower() in {"true", "yes", "1"}
    try:
        if "int" in kinds and not isinstance(value, bool) and int(text) == float(text):
            return int(text)
        if "float" in kinds and not isinstance(value, bool):
            return float(text)
    except (TypeError, ValueError, OverflowError):
        pass
    if "str" in kinds and isinstance(value, str):
        return text
    raise OptionError(
        f"option '{item.name}' of method '{method}' is {value!r}; it takes {' or '.join(kinds)}."
    )
