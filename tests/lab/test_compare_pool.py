"""Workers: jobs in order, one death costs one job, nothing is handed out after a stop."""

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

from gradrank.lab.compare.pool import Event, Pool


def echo(pipe: Connection, word: str) -> None:
    """A worker that does what its job says; spawned processes import it from here."""
    while (job := pipe.recv()) is not None:
        if job == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "leave":
            os._exit(3)
        pipe.send(("progress", f"{word}{job}{os.environ['OMP_NUM_THREADS']}"))
        pipe.send(("done", os.environ.get("CUDA_VISIBLE_DEVICES")))


def carried(pool: Pool, jobs: list[Any]) -> list[Event]:
    try:
        return list(pool.run(jobs))
    finally:
        pool.close()


def test_a_death_costs_its_job_and_nothing_else() -> None:
    before = dict(os.environ)
    events = carried(Pool(echo, 1, ("w",)), ["a", "die", "b", "leave", "c"])
    told = [(event.kind, event.job) for event in events if event.kind in {"done", "died"}]
    assert told == [("done", "a"), ("died", "die"), ("done", "b"), ("died", "leave"), ("done", "c")]
    deaths = [event.detail for event in events if event.kind == "died"]
    assert "SIGKILL" in deaths[0]
    assert "exit code 3" in deaths[1]
    assert [event.detail for event in events if event.kind == "progress"] == ["wa1", "wb1", "wc1"]
    assert dict(os.environ) == before


def test_a_worker_that_dies_between_jobs_costs_nothing() -> None:
    pool = Pool(echo, 1, ("w",))
    try:
        events = list(pool.run(["a"]))
        first = pool._workers[0].process
        first.kill()
        first.join()
        events += list(pool.run(["b", "c"]))
        assert pool._workers[0].process.pid != first.pid
    finally:
        pool.close()
    assert [e.job for e in events if e.kind == "done"] == ["a", "b", "c"]
    assert not [e for e in events if e.kind == "died"]


def test_workers_share_out_devices_and_threads() -> None:
    pool = Pool(echo, 2, ("",), devices=("0", "1"), threads=3)
    events = carried(pool, [1, 2, 3, 4, 5, 6])
    done = [event for event in events if event.kind == "done"]
    assert sorted(event.job for event in done) == [1, 2, 3, 4, 5, 6]
    assert all(event.detail == str(event.slot) for event in done)
    assert {event.detail for event in events if event.kind == "progress"} <= {
        f"{job}3" for job in range(1, 7)
    }


def test_after_a_stop_nothing_is_handed_out() -> None:
    pool, done = Pool(echo, 1, ("",)), []
    try:
        for event in pool.run([1, 2, 3]):
            if event.kind == "done":
                done.append(event.job)
                pool.stopping = True
    finally:
        pool.close()
    assert done == [1]


def test_silence_is_an_event() -> None:
    pool = Pool(echo, 1, ("",))
    pool.beat = 0.01  # a process takes longer than that to start
    events = carried(pool, [1])
    assert {(event.job, event.slot) for event in events if event.kind == "quiet"} == {(None, -1)}
