"""What EVA sees of a model's inputs: rows that count, batches of enough, explained variance.

PEFT's helpers assume language models: every input ``[batch, position, feature]``, and ``input_ids``
beside it. Encoders' poolers get ``[batch, feature]`` and pictures have no mask.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.lab.baselines.arm import Batch

# The label that losses leave out.
_IGNORED = -100


class InputRows:
    """Which rows of a target's input count: real tokens, and of these those with a label.

    Attributes:
        notes: What a reader must know of the choice.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch]
    ) -> None:
        """Look at one batch.

        Args:
            model: The base model.
            targets: The targets.
            batches: Calibration batches.

        Raises:
            MeasurementError: If there are none.
        """
        if not batches:
            raise MeasurementError("'eva' was given no calibration batch. Give more data.")
        self.model, self.targets, self.batches = model, targets, batches
        self.notes: tuple[str, ...] = ()
        self._labelled = all(_per_token(batch) for batch in batches)
        self._rows = [self._rows_in(batch) for batch in batches]

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run the model without its loss; encoder-decoders make their inputs from the labels.

        Args:
            model: The model.
            batch: A batch.

        Returns:
            The model's output.
        """
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            return model(**batch)
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    def mask_of(self, batch: Batch, _config: Any = None) -> Tensor | None:
        """Return which positions count, bool ``[batch, position]``; None: all.

        Args:
            batch: A batch.
            _config: PEFT's configuration; not looked at.
        """
        if "input_ids" not in batch:
            return None
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        return mask & (batch["labels"] != _IGNORED) if self._labelled else mask

    def rows_of(self, states: Any, mask: Tensor | None, _name: str = "") -> Tensor:
        """Return the rows of a target's input that count, ``[row, feature]``.

        Args:
            states: The input, a tensor or a tuple that begins with it.
            mask: What :meth:`mask_of` returned.
            _name: The target; not looked at.
        """
        found = states if isinstance(states, Tensor) else states[0]
        if mask is not None and found.shape[:-1] == mask.shape:
            return found[mask]
        # PEFT takes views of what it gets here, and a pooler's input is a slice.
        return found.reshape(-1, found.shape[-1]).contiguous()

    def grouped(self, rows: int) -> list[Batch]:
        """Put batches together until each holds enough rows for the PCA.

        Args:
            rows: Rows that every target must see at once.

        Returns:
            The groups; batches that are too few at the end are left out.

        Raises:
            MeasurementError: If all batches together hold too few.
        """
        groups = self._groups(rows)
        if not groups and self._labelled:
            self._labelled = False
            self._rows = [self._rows_in(batch) for batch in self.batches]
            self.notes = ("Too few tokens have labels; EVA looked at all real tokens instead.",)
            groups = self._groups(rows)
        if not groups:
            raise MeasurementError(
                f"'eva' needs {rows} rows of input at once for its PCA, and {len(self.batches)} "
                "batches hold fewer. Raise its option 'batches', or lower the budget."
            )
        return groups

    def _groups(self, rows: int) -> list[Batch]:
        groups: list[Batch] = []
        pending: list[Batch] = []
        held = 0
        for batch, count in zip(self.batches, self._rows, strict=True):
            pending.append(batch)
            held += count
            if held >= rows:
                groups.append(joined(pending))
                pending, held = [], 0
        return groups

    @torch.no_grad()
    def _rows_in(self, batch: Batch) -> int:
        """Fewest rows that a target gets from a batch."""
        seen: dict[str, int] = {}
        mask = self.mask_of(batch)

        def look(name: str) -> Any:
            return lambda _module, args: seen.update({name: len(self.rows_of(args, mask))})

        with _hooked(self.model, {target.name: look(target.name) for target in self.targets}):
            self.forward(self.model, batch)
        silent = [target.name for target in self.targets if target.name not in seen]
        if silent:
            raise MeasurementError(
                f"'{silent[0]}' and {len(silent) - 1} other target(s) got no input, and 'eva' "
                "looks at inputs. Leave them out."
            )
        return min(seen.values())


def joined(batches: Sequence[Batch]) -> Batch:
    """Put batches together into one, shorter texts padded on the right.

    Args:
        batches: Batches with the same fields.

    Returns:
        One batch.

    Raises:
        MeasurementError: If texts of different lengths come without an attention mask.
    """
    if len(batches) == 1:
        return dict(batches[0])
    whole = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        widths = {part.shape[1] for part in parts if part.dim() == 2}
        if len(widths) > 1:
            if "attention_mask" not in batches[0]:
                raise MeasurementError(
                    f"batches of different lengths ({min(widths)} and {max(widths)} in '{name}') "
                    "cannot be put together without an attention mask. Give 'eva' larger batches."
                )
            fill = _IGNORED if name == "labels" else 0
            parts = [pad(part, (0, max(widths) - part.shape[1]), value=fill) for part in parts]
        whole[name] = torch.cat(parts)
    return whole


@torch.no_grad()
def explained(
    model: nn.Module, found: Mapping[str, Tensor], inputs: InputRows, groups: Sequence[Batch]
) -> dict[str, list[float]]:
    """Return the share of the inputs' variance that each direction explains.

    Args:
        model: The base model.
        found: Directions of unit length, ``[rank, d_in]`` by target, in PEFT's order.
        inputs: Which rows count.
        groups: The batches.

    Returns:
        Shares by target, made to fall (an unfinished PCA may have two neighbours swapped).
    """
    sums: dict[str, _Moments] = {name: _Moments(rows) for name, rows in found.items()}
    mask: list[Tensor | None] = [None]

    def look(name: str) -> Any:
        return lambda _module, args: sums[name].add(inputs.rows_of(args, mask[0]))

    with _hooked(model, {name: look(name) for name in found}):
        for batch in groups:
            mask[0] = inputs.mask_of(batch)
            inputs.forward(model, batch)
    return {name: moments.shares() for name, moments in sums.items()}


class _Moments:
    """Sums from which the variance along directions, and the whole one, follow."""

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions.double()
        self.count, self.along, self.squared = 0, [], []

    def add(self, rows: Tensor) -> None:
        """Add rows, ``[row, feature]``."""
        rows = rows.double()
        self.count += len(rows)
        along = rows @ self.directions.T
        self.along.append(torch.stack([along.sum(0), along.square().sum(0)]))
        self.squared.append(torch.stack([rows.sum(0), rows.square().sum(0)]))

    def shares(self) -> list[float]:
        """Return the share of each direction."""
        along, whole = self._variances(self.along), self._variances(self.squared).sum()
        shares = (along / whole).nan_to_num(0.0).clamp_min(0.0)
        return torch.cummin(shares, 0).values.tolist() if len(shares) else []

    def _variances(self, sums: list[Tensor]) -> Tensor:
        first, second = torch.stack(sums).sum(0) / self.count
        return second - first.square()


def _per_token(batch: Batch) -> bool:
    return (
        "labels" in batch
        and "input_ids" in batch
        and (batch["labels"].shape == batch["input_ids"].shape)
    )


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """Hook modules before their forward, in evaluation mode, and leave everything as it was."""
    handles = [model.get_submodule(n).register_forward_pre_hook(h) for n, h in hooks.items()]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
