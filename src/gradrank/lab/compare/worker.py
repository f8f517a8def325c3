"""What a worker process does: carry runs out, one after the other, and save their records."""

import gc
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from gradrank.lab.compare.bench import Bench
from gradrank.lab.compare.carry import blank, carry_out
from gradrank.lab.compare.grid import GridRun
from gradrank.lab.compare.recipe import Recipe
from gradrank.lab.compare.store import Store
from gradrank.lab.quiet import ignore_their_warnings
from gradrank.lab.recipes import read
from gradrank.record import RunRecord

_EVERY = 0.5  # seconds between two lines of progress


class ParentGoneError(BaseException):
    """Nobody listens any more; no failure of the run, which leaves no record."""


def main(pipe: Connection, folder: Path, threads: int, data_dir: str | None) -> None:
    """Work until told to stop.

    Args:
        pipe: Runs come in as plain data; what happens goes out.
        folder: The grid's folder, with its recipe.
        threads: Threads of PyTorch.
        data_dir: Folder with public data.
    """
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    ignore_their_warnings()
    store = Store(folder)
    recipe = read(folder / "recipe.yaml")
    bench = Bench(store.cache, data_dir)
    try:
        while (job := pipe.recv()) is not None:
            _work(GridRun.from_dict(job), recipe, bench, store, pipe)
            pipe.send(("done", None))
    except (ParentGoneError, EOFError, BrokenPipeError):
        return


def _work(run: GridRun, recipe: Recipe, bench: Bench, store: Store, pipe: Connection) -> None:
    told = [time.monotonic()]

    def progress(step: int, steps: int, loss: float, _left: float) -> None:
        now = time.monotonic()
        if now - told[0] >= _EVERY:
            told[0] = now
            try:
                pipe.send(("progress", (step, steps, loss)))
            except OSError as error:
                raise ParentGoneError from error

    try:
        record = carry_out(run, recipe, bench, progress)
    except Exception as error:  # a defect costs one run of a grid, not the night
        last: Any = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        record = failed(run, recipe, f"{type(error).__name__} at {where}: {error}")
    if record.status == "interrupted":
        return
    store.save(run, record)
    # Wrapped models are full of cycles; the next run wants their memory.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed(run: GridRun, recipe: Recipe, message: str) -> RunRecord:
    """Return the record of a run that did not come to an end of its own.

    Args:
        run: The run.
        recipe: Its recipe.
        message: Why.

    Returns:
        The record.
    """
    record = blank(run, recipe)
    record.status = "failed"
    record.comparison = {**(record.comparison or {}), "message": message}
    return record
