"""One of two processes dies: the other ends with an error in bounded time."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gradrank.adapters import sidecar
from gradrank.core import marker

pytestmark = [pytest.mark.dist, pytest.mark.slow]
PATIENCE = 240


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize(("moment", "last"), [("step", "checkpoint-2"), ("save", "checkpoint-2")])
def test_the_other_process_ends_and_no_half_checkpoint_counts(
    tmp_path: Path, moment: str, last: str
) -> None:
    worker, port = str(Path(__file__).with_name("crash_worker.py")), str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(tmp_path / "out"), moment],
            env={
                **os.environ,
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        _, said = processes[0].communicate(timeout=PATIENCE)
        processes[1].communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode not in {0, -signal.SIGKILL}
    assert "Connection closed" in said or "Gloo" in said or "gloo" in said, said[-2000:]
    whole = marker.last_complete(tmp_path / "out", sidecar.FILE)
    assert whole is not None
    assert whole.name == last
