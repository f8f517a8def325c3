"""Processes of tests, forked off one that has imported what takes seconds to import.

Each is a process of its own that runs a script as ``python SCRIPT ...`` would; only the imports are
not paid again. Python's fork server never trains or measures, so that nothing is left in it that a
fresh process would not have.
"""

import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from quick import compile_templates_once

CONTEXT = multiprocessing.get_context("forkserver")
HEAVY = [
    "torch",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "gradrank.cli.main",
    "gradrank.lab",
]
CONTEXT.set_forkserver_preload(HEAVY)
COMMAND = Path(__file__).with_name("command.py")
"""The command line: ``start(COMMAND, "plan", ...)``."""
# Of accelerate's launchers this one starts several processes without MPI; what it starts says
# itself that it wants the CPU.
_ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
_ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def _work(
    command: Sequence[str], environment: Mapping[str, str], said: str, errors: str, session: bool
) -> None:
    """Run a script in this process, which is a fork of the server."""
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, number in ((said, 1), (errors, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    compile_templates_once()
    gc.freeze()
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


class Started:
    """One process: what it says goes to files, so that no pipe is ever full."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], session: bool
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="started-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._said, self._errors = folder / "stdout", folder / "stderr"
        self._said.touch()
        self._errors.touch()
        self._process = CONTEXT.Process(
            target=_work,
            args=(list(command), dict(environment), str(self._said), str(self._errors), session),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def stdout(self) -> str:
        """What was written to standard output so far."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What was written to standard error so far."""
        return self._errors.read_text(encoding="utf-8", errors="replace")

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """Wait for the end; one that does not end is killed, and the test fails."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"no end within {seconds} s. It said: {self.stderr[-3000:]}")
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(30)


def start(
    script: Path | str, *arguments: str, session: bool = False, **environment: str
) -> Started:
    """Start a script; ``session`` gives it a process group of its own."""
    return Started([str(script), *arguments], _settings(environment), session)


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}


def run(script: Path | str, *arguments: str, seconds: float, **environment: str) -> Started:
    """Run a script to its end and return it, whatever its exit code."""
    started = start(script, *arguments, **environment)
    started.wait(seconds)
    return started


def start_ranks(script: Path | str, *arguments: str, **environment: str) -> list[Started]:
    """Start a script twice, with the variables that torchrun gives to two processes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        start(
            script,
            *arguments,
            **{**shared, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, **environment},
        )
        for rank in ("0", "1")
    ]


def run_ranks(
    script: Path | str, *arguments: str, seconds: float, **environment: str
) -> list[Started]:
    """Run a script in two processes to its end; a failure of one fails the test and names it."""
    ranks = start_ranks(script, *arguments, **environment)
    deadline = time.monotonic() + seconds
    try:
        while any(one.code is None for one in ranks) and time.monotonic() < deadline:
            if any(one.code for one in ranks):
                break  # its peer may wait for it until a long limit of its own
            time.sleep(0.05)
    finally:
        codes = [one.code for one in ranks]
        for one in ranks:
            one.kill()
    for rank, (one, code) in enumerate(zip(ranks, codes, strict=True)):
        assert not code, f"[process {rank}, exit code {code}] {one.stderr[-3000:]}"
    assert codes == [0, 0], f"no end within {seconds} s: {codes}"
    return ranks


def accelerate_launch(
    script: Path | str, *arguments: str, seconds: float, **environment: str
) -> str:
    """Run a script in two processes that accelerate's real launcher starts; return what they say.

    Nothing is forked here: the launcher and both processes are fresh. A failure fails the test.
    """
    done = subprocess.run(
        [sys.executable, "-m", *_ACCELERATE, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=_settings(environment),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
