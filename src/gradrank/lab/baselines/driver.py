"""What baselines share that do something between the steps of training but move no capacity."""

from typing import Any

from transformers import TrainerCallback


class StepDriver(TrainerCallback):
    """A Trainer callback in the shape of :class:`gradrank.lab.train.Capacity`.

    Ranks stay what they are, so there are no decisions to record.
    """

    @property
    def ranks_over_time(self) -> list[Any]:
        """Empty: no rank moves."""
        return []

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """Empty: nothing is decided about capacity."""
        return []

    @property
    def start_parameters(self) -> int | None:
        """None: the model's own parameters, which never change."""
        return None

    @property
    def neurons(self) -> dict[str, Any] | None:
        """None: no neurons are split."""
        return None

    def close(self) -> None:
        """Undo whatever was for training only; safe to call twice."""
