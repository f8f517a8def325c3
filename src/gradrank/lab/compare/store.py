"""The folder of a grid: one record per run, whole or absent, and what is known of each run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gradrank.core.errors import GradrankError
from gradrank.lab.compare.grid import GridRun
from gradrank.record import RunRecord


@dataclass
class Found:
    """What a grid's folder holds.

    Attributes:
        records: Records of this grid's runs by run, whatever their status.
        excluded: Files that count for nothing, with the reason.
    """

    records: dict[str, RunRecord] = field(default_factory=dict)
    excluded: list[tuple[str, str]] = field(default_factory=list)

    def finished(self, run: GridRun) -> RunRecord | None:
        """Return the record of a run that finished.

        Args:
            run: The run.
        """
        record = self.records.get(run.id)
        return record if record is not None and record.status == "finished" else None


class Store:
    """A grid's folder.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def runs(self) -> Path:
        """Where records stand."""
        return self.folder / "runs"

    @property
    def cache(self) -> Path:
        """Where measurements stand that several runs share; may be removed at any time."""
        return self.folder / "cache"

    def path(self, run: GridRun) -> Path:
        """Return where a run's record stands.

        Args:
            run: The run.
        """
        return self.runs / f"{run.id}.json"

    def save(self, run: GridRun, record: RunRecord) -> None:
        """Write a run's record, whole or not at all.

        Args:
            run: The run.
            record: Its record.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        record.save(self.path(run), overwrite=True)

    def read(self, runs: Iterable[GridRun]) -> Found:
        """Read what is there of some runs.

        A record that cannot be read, or that says to be of another run, is named and left out.

        Args:
            runs: The runs of the grid.

        Returns:
            Records, and what was left out.
        """
        found = Found()
        wanted = {run.id: run for run in runs}
        files = sorted(self.runs.glob("*.json")) if self.runs.is_dir() else []
        for path in files:
            if path.stem not in wanted:
                continue
            try:
                record = RunRecord.load(path)
            except GradrankError as error:
                found.excluded.append((path.name, str(error)))
                continue
            if (record.comparison or {}).get("run") != path.stem:
                found.excluded.append((path.name, "it is the record of another run"))
                continue
            found.records[path.stem] = record
        strangers = sum(path.stem not in wanted for path in files)
        if strangers:
            found.excluded.append(
                (f"{strangers} file(s)", "of other settings than the recipe's now; not looked at")
            )
        return found
