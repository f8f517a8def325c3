"""Peak memory of a phase, in bytes, on the device that does the work.

On a GPU: the most that PyTorch had allocated. On a CPU: the most that the process had resident,
with everything that was there before the phase (model, libraries).
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
INTERVAL = 0.02


def _read_status(key: str) -> int:
    """Return a field of the process status in bytes, or 0 where there is none."""
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


class PeakMemory:
    """Watch a phase.

    A context manager. On a CPU under Linux the kernel's own high-water mark is reset and read,
    which misses nothing and costs nothing; where that is not allowed a thread samples the
    resident size every 20 ms. Phases may be nested.

    Attributes:
        peak: Bytes at the highest point of the phase; 0 if the system does not tell.
    """

    _active: list["PeakMemory"] = []  # noqa: RUF012 - shared on purpose: nested phases see it

    def __init__(self, device: torch.device, sample: bool = False) -> None:
        """Prepare.

        Args:
            device: Where the work is done.
            sample: Use the sampling thread even where the kernel's mark could be used.
        """
        self.device, self.sample = device, sample
        self.peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start watching, and return this object."""
        for outer in self._active:  # a reset below would make them forget
            outer.peak = max(outer.peak, outer._mark())
        self._active.append(self)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.sample or not self._reset():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self.peak = max(self.peak, self._mark())
        self._active.remove(self)
        if self._thread is not None:
            self._stop.set()
            self._thread.join()

    @staticmethod
    def _reset() -> bool:
        try:
            _CLEAR.write_text("5", encoding="ascii")
        except OSError:
            return False
        return _read_status("VmHWM") > 0

    def _mark(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _read_status("VmRSS" if self._thread is not None else "VmHWM")

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, _read_status("VmRSS"))
