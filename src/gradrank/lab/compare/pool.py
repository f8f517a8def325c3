"""Run jobs in worker processes that outlive a job, and survive one that dies.

A worker keeps data and libraries loaded between runs, which for small models takes longer than the
runs. One that dies (out of memory, killed) costs its run and nothing else.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_BEAT = 10.0  # seconds until silence is an event
# What BLAS and OpenMP read when they are loaded; a worker that took all cores would slow the rest.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    slot: int
    job: Any = None


@dataclass(frozen=True, slots=True)
class Event:
    """What a worker had to say.

    Attributes:
        kind: ``started``, ``progress``, ``done``, ``died``; ``quiet`` if nobody had anything.
        job: The job; None of ``quiet``.
        slot: Number of the worker; -1 of ``quiet``.
        detail: Of ``progress``: step, steps, loss; of ``died``: why, in words.
    """

    kind: str
    job: Any
    slot: int
    detail: Any = None


class Pool:
    """Worker processes for one kind of job.

    Attributes:
        stopping: Set it, and no further job is handed out.
        beat: Seconds after which silence is an event.
    """

    beat = _BEAT

    def __init__(
        self,
        main: Callable[..., None],
        workers: int,
        arguments: tuple[Any, ...],
        devices: tuple[str, ...] = (),
        threads: int = 1,
    ) -> None:
        """Prepare; processes start with the first job.

        Args:
            main: ``main(pipe, *arguments)``, an importable function: receives a job, sends
                ``("progress", ...)`` any number of times and ``("done", None)``, until it receives
                None.
            workers: How many processes.
            arguments: Further arguments of ``main``.
            devices: GPUs to share out, one per worker in turn, as ``CUDA_VISIBLE_DEVICES`` takes
                them; empty: leave the environment alone.
            threads: Threads of each worker.
        """
        self._main, self._arguments = main, arguments
        self._count, self._devices, self._threads = workers, devices, threads
        self._workers: list[_Worker] = []
        self._context: Any = multiprocessing.get_context("spawn")
        self.stopping = False

    def run(self, jobs: list[Any]) -> Iterator[Event]:
        """Work through jobs in order.

        Args:
            jobs: Plain data.

        Yields:
            What happens. A job whose worker died is reported and not tried again.
        """
        waiting = list(reversed(jobs))
        while True:
            for slot in range(self._count):
                worker = self._idle(slot) if waiting and not self.stopping else None
                if worker is not None:
                    worker = self._hand(worker, waiting.pop())
                    yield Event("started", worker.job, slot)
            busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
            if not busy:
                return
            heard = wait(list(busy), self.beat)
            if not heard:
                yield Event("quiet", None, -1)
            for pipe in heard:
                yield from self._hear(busy[pipe])  # pyright: ignore[reportArgumentType]

    def close(self, kill: bool = False) -> None:
        """End the processes.

        Args:
            kill: Whether to end them in the middle of a job.
        """
        for worker in self._workers:
            if kill:
                worker.process.terminate()
            else:
                try:
                    worker.pipe.send(None)
                except OSError:
                    worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _idle(self, slot: int) -> _Worker | None:
        known = next((worker for worker in self._workers if worker.slot == slot), None)
        if known is not None:
            return known if known.job is None else None
        return self._start(slot)

    def _hand(self, worker: _Worker, job: Any) -> _Worker:
        """Give a worker a job; one that died while it had none is replaced, at no job's cost."""
        try:
            worker.pipe.send(job)
        except OSError:
            self._bury(worker)
            worker = self._start(worker.slot)
            worker.pipe.send(job)
        worker.job = job
        return worker

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        self._workers.remove(worker)
        worker.pipe.close()

    def _start(self, slot: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        settings: dict[str, str] = {name: str(self._threads) for name in _THREADS}
        if self._devices:
            settings["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        process = self._context.Process(
            target=_enter, args=(self._main, theirs, *self._arguments), daemon=True
        )
        with _environment(settings):
            process.start()
        theirs.close()
        worker = _Worker(process, ours, slot)
        self._workers.append(worker)
        return worker

    def _hear(self, worker: _Worker) -> Iterator[Event]:
        job = worker.job
        try:
            kind, detail = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            yield Event("died", job, worker.slot, _cause(worker.process.exitcode))
            return
        if kind == "done":
            worker.job = None
        yield Event(kind, job, worker.slot, detail)


def _enter(main: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    # Ctrl-C goes to the whole group; only the parent decides what becomes of running jobs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(pipe, *arguments)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the process that is started inside."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        more = ": probably out of memory" if name == "SIGKILL" else ""
        return f"its worker was ended by {name}{more}"
    return f"its worker ended with exit code {code}"
