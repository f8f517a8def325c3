"""Where sketches of batch after batch are kept on the host: in few, large pieces.

Small tensors that stay, made between the large ones of forward passes, would cut the allocator's
free memory into parts that no activation fits into any more.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_BATCHES = 8


class RowStore:
    """Vectors per target, one for each batch."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self._widths = dict(widths)
        self._pieces: list[Tensor] = []
        self._count = 0

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Store a batch.

        Args:
            rows: Per target ``[D]`` float32, on the CPU.
        """
        place = self._count % _BATCHES
        if not place:
            self._pieces.append(torch.empty(_BATCHES, sum(self._widths.values())))
        torch.cat([rows[name] for name in self._widths], out=self._pieces[-1][place])
        self._count += 1

    def take(self) -> dict[str, Tensor]:
        """Hand out everything, and forget it.

        Returns:
            Per target ``[M, D]``.
        """
        pieces, count = self._pieces, self._count
        self._pieces, self._count = [], 0
        found: dict[str, Tensor] = {}
        start = 0
        for name, width in self._widths.items():
            parts = [piece[:, start : start + width] for piece in pieces]
            # The last piece may be filled in part only, and nothing of the rest is to be held.
            found[name] = torch.cat([*parts, torch.empty(0, width)])[:count].clone()
            start += width
        return found
