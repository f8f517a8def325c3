"""A whole grid: search the rates, run what is missing, in parallel, and say how far it is."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from gradrank.core.errors import DataError, OptionError, OutputError, nearest
from gradrank.core.files import explain_os_error, write_text
from gradrank.evidence.comparison import Comparison, compare
from gradrank.evidence.metrics import METRICS
from gradrank.lab.compare.bench import Bench
from gradrank.lab.compare.grid import FINAL, GridRun, final_runs, stability_runs, tuning_runs
from gradrank.lab.compare.pool import Pool
from gradrank.lab.compare.process import main
from gradrank.lab.compare.recipe import Recipe
from gradrank.lab.compare.store import Found, Store
from gradrank.lab.compare.telling import Say, Telling
from gradrank.lab.compare.tuning import Cell, cell_of, chosen_rates
from gradrank.lab.compare.worker import failed
from gradrank.lab.locate import locate
from gradrank.lab.recipes import read
from gradrank.record import RunRecord

NO_RATE = "no learning rate that was searched for this arm worked: see its tuning runs"


@dataclass
class Grid:
    """A comparison in its folder.

    Attributes:
        recipe: What is compared.
        store: Where.
        data_dir: Folder with public data, or None.
        workers: Processes.
        retry: Whether runs that failed are tried again.
        say: Receives one line per finished run, and what is in hand after a minute of silence.
        metric: Metric to report instead of each task's own.
        stopped: Set it to end after the runs that are being carried out.
        failures: Runs that failed since the grid was taken up, by their names.
    """

    recipe: Recipe
    store: Store
    data_dir: str | None = None
    workers: int = 1
    retry: bool = False
    say: Say = lambda _line: None
    metric: str | None = None
    stopped: bool = False
    failures: list[str] = field(default_factory=list)
    _pool: Pool | None = field(default=None, repr=False)

    def work(self) -> None:
        """Run what is missing: rates first, then the reported runs, then other calibrations.

        Raises:
            DataError: If a model or data is missing.
            OutputError: If another process works on the same grid.
        """
        self._check_inputs()
        with alone(self.store.folder):
            self._work()

    def _work(self) -> None:
        cores = os.cpu_count() or 1
        threads = max(1, cores // self.workers)
        devices = tuple(str(i) for i in range(torch.cuda.device_count()))
        self._pool = Pool(
            main,
            self.workers,
            (self.store.folder, threads, self.data_dir),
            devices if self.workers > 1 else (),
            threads,
        )
        killed = True
        try:
            for phase in (self.tuning, self.final, self.stability):
                self._phase(phase())
            killed = False
        finally:
            self._pool.close(kill=killed)
            self._pool = None

    def take_reference(self, label: str) -> None:
        """Compare with another line than the recipe says.

        Args:
            label: Its label.

        Raises:
            OptionError: If the recipe has no such line.
        """
        labels = [variant.label for variant in self.recipe.variants]
        if label not in labels:
            raise OptionError(
                f"recipe '{self.recipe.name}' has no method '{label}'. {nearest(label, labels)}"
            )
        self.recipe = replace(self.recipe, reference=label)

    def stop(self) -> None:
        """Hand out no further run."""
        self.stopped = True
        if self._pool is not None:
            self._pool.stopping = True

    def tuning(self) -> list[GridRun]:
        """Return the runs that choose learning rates."""
        return tuning_runs(self.recipe)

    def final(self) -> list[GridRun]:
        """Return the reported runs, each with the rate that is chosen by now.

        A cell whose rates are searched and of which none is known yet takes the recipe's rate, and
        so has no finished run: its runs change their names with the rate.
        """
        return final_runs(self.recipe, self._rates())

    def stability(self) -> list[GridRun]:
        """Return the runs that only allocate."""
        return stability_runs(self.recipe, self._rates())

    def _rates(self) -> dict[Cell, float]:
        tuning = self.tuning()
        return chosen_rates(tuning, self.store.read(tuning))

    def all_runs(self) -> list[GridRun]:
        """Return every run of the grid as it is known now."""
        rates = self._rates()  # once: it reads every record of the search
        return [
            *self.tuning(),
            *final_runs(self.recipe, rates),
            *stability_runs(self.recipe, rates),
        ]

    def comparison(self) -> tuple[Comparison, Found]:
        """Return what the finished runs are evidence of."""
        found = self.store.read(self.all_runs())
        records = [self._by_metric(found.records[key]) for key in sorted(found.records)]
        return compare(records, found.excluded, self.recipe.reference), found

    def _by_metric(self, record: RunRecord) -> RunRecord:
        """Return a record that names the metric that was asked for, where its run has it."""
        if self.metric is None or self.metric not in record.metrics:
            return record
        higher = METRICS[self.metric].higher_is_better
        about = {**(record.comparison or {}), "metric": self.metric, "higher_is_better": higher}
        return replace(record, comparison=about)

    def missing(self, runs: Sequence[GridRun]) -> list[GridRun]:
        """Return the runs that have no record to stand on.

        Args:
            runs: Runs.

        Returns:
            Those without a record, and with ``retry`` those that failed.
        """
        found = self.store.read(runs)
        kept = {"finished"} if self.retry else {"finished", "failed"}
        records = found.records
        return [r for r in runs if r.id not in records or records[r.id].status not in kept]

    def _check_inputs(self) -> None:
        """Find each model, and read each task's data: what is missing is told now, by one error."""
        models = set()
        for task in self.recipe.tasks:
            bench = Bench(self.store.cache, self.data_dir)
            for config in {self.recipe.config(task, variant) for variant in self.recipe.variants}:
                models.add(config.model)
                bench.examples(config, "validation" if config.validation else "test")
        for model in sorted(models):
            locate(model, self.say)

    def _phase(self, runs: list[GridRun]) -> None:
        missing = self.missing(runs)
        if not missing or self.stopped or self._pool is None:
            return
        phase = missing[0].phase
        if phase == FINAL:
            missing = self._tuned(missing)
        self.say(f"{phase}: {len(missing)} of {len(runs)} runs to do")
        telling = Telling(phase, len(missing), self.say)
        for event in self._pool.run([run.to_dict() for run in missing]):
            telling.hear(event)
            if event.kind in {"done", "died"}:
                run = GridRun.from_dict(event.job)
                if event.kind == "died":
                    self.store.save(run, failed(run, self.recipe, str(event.detail)))
                record = self.store.read([run]).records.get(run.id)
                if record is None or record.status != "finished":
                    self.failures.append(run.id)
                telling.finished(run, record)

    def _tuned(self, missing: list[GridRun]) -> list[GridRun]:
        """Return the runs whose rate is known; the others fail, since no rate of theirs worked."""
        searched, rates = {cell_of(run) for run in self.tuning()}, self._rates()
        lost = [run for run in missing if cell_of(run) in searched - rates.keys()]
        for run in lost:
            self.store.save(run, failed(run, self.recipe, NO_RATE))
            self.failures.append(run.id)
        return [run for run in missing if run not in lost]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from working on a grid.

    Args:
        folder: The grid's folder.

    Yields:
        Nothing.

    Raises:
        OutputError: If another process works on it.
    """
    lock = FileLock(str(folder / ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"another process works on the grid in '{folder}'. Wait for it, or choose another "
            "--out."
        ) from None  # nothing is broken: the call is refused
    except OSError as error:
        raise OutputError(explain_os_error(error, folder)) from error
    try:
        yield
    finally:
        lock.release()


def open_grid(path: Path, out: Path, data_dir: str | None = None) -> Grid:
    """Take up the grid of a recipe in a folder, new or begun.

    Args:
        path: The recipe.
        out: The grid's folder; created if need be.
        data_dir: Folder with public data.

    Returns:
        The grid; the folder holds a copy of the recipe, by which it goes on later.

    Raises:
        DataError: If the recipe is none.
        OutputError: If the folder holds something else, or another recipe's grid.
    """
    recipe = read(path)
    kept = out / "recipe.yaml"
    if out.is_dir() and any(out.iterdir()) and not kept.is_file():
        raise OutputError(f"'{out}' holds other files and no grid. Choose another --out.")
    if kept.is_file() and kept.resolve() != path.resolve():
        try:
            before = read(kept).name
        except DataError:
            before = "an unreadable recipe"
        if before != recipe.name:
            raise OutputError(
                f"'{out}' holds the grid of '{before}', not of '{recipe.name}'. Choose another "
                "--out."
            )
    if not kept.is_file() or kept.resolve() != path.resolve():
        text = path.read_text(encoding="utf-8")
        if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
            _keep(kept, text)
    return Grid(recipe, Store(out), data_dir)


def _keep(kept: Path, text: str) -> None:
    """Write the grid's copy of its recipe, which the workers of a grid at work still read."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(explain_os_error(error, kept)) from error
    with alone(kept.parent):
        write_text(kept, text)
