"""What can be asked for: the signals of a measurement, with their options."""

from collections.abc import Callable
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
