"""What can be asked for: the signals of a measurement, with their options."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradrank.core.errors import OptionError, nearest

ESTIMATORS = ("sketch", "dense")
MAX_SKETCH = 4096


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Request for the spectrum over batches (GARD).

    Attributes:
        estimator: ``sketch`` (default) or ``dense`` (exact, several passes over the batches).
        sketch_dim: Sketch size k on either side.
        max_bytes: Cap on the gradients that ``dense`` holds at once.
    """

    estimator: str = "sketch"
    sketch_dim: int = 128
    max_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            hint = nearest(self.estimator, ESTIMATORS)
            raise OptionError(f"estimator '{self.estimator}' is unknown. {hint}")
        if not 1 <= self.sketch_dim <= MAX_SKETCH:
            raise OptionError(f"sketch_dim is {self.sketch_dim}; it must lie in 1..{MAX_SKETCH}.")


@dataclass(frozen=True, slots=True)
class MeanGradient:
    """Request for the singular values of the mean gradient (water-filling).

    Attributes:
        directions: How many leading directions to resolve.
        rows: Whether to keep row factors too, ``4 k`` bytes per output row for all batches and
            for each half of them: what partitions of output neurons are priced by.
    """

    directions: int = 40
    rows: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.directions <= MAX_SKETCH:
            raise OptionError(f"directions is {self.directions}; it must lie in 1..{MAX_SKETCH}.")


Signal = Spectrum | MeanGradient
SIGNALS: dict[str, Callable[[], Signal]] = {"spectrum": Spectrum, "mean-gradient": MeanGradient}


def asked_for(signal: "str | Signal | Sequence[str | Signal]") -> tuple[Signal, ...]:
    """Return the requests that a caller means, each kind once.

    Args:
        signal: A signal or its name, or several of these.

    Returns:
        The requests; one for a mean gradient with rows serves one without.

    Raises:
        OptionError: If a name is unknown, a kind is asked for twice, or there is none.
    """
    asked = [signal] if isinstance(signal, str) or not isinstance(signal, Sequence) else signal
    unknown = [item for item in asked if isinstance(item, str) and item not in SIGNALS]
    if unknown:
        raise OptionError(f"signal '{unknown[0]}' is unknown. {nearest(unknown[0], SIGNALS)}")
    requests = [SIGNALS[item]() if isinstance(item, str) else item for item in asked]
    plain = [item for item in requests if isinstance(item, MeanGradient) and not item.rows]
    found: list[Signal] = []
    for item in requests:
        # What waterfill and hybrid ask for together is one request.
        with_rows = dataclasses.replace(item, rows=True) if item in plain else None
        if with_rows in requests:
            continue
        if type(item) in {type(other) for other in found}:
            raise OptionError(f"signal {item!r} is asked for twice.")
        found.append(item)
    if not found:
        raise OptionError(f"no signal was asked for. Known: {', '.join(SIGNALS)}.")
    return tuple(found)
