"""Verbs in forked children that are killed, or refused by the system, at a chosen moment.

One process imports everything once; each run of a verb is a fork of it. A moment is one operation
on files under the scenario's folder (opening for writing, renaming, linking, making, removing), as
Python's audit events tell of them, so that a run can be cut off at each of them in turn.
Usage: fault_worker.py FOLDER SCENARIO...; writes FOLDER/SCENARIO.json.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cli.cli_cases import SHORT, TINY
from gradrank.adapters import sidecar
from gradrank.cli import demo_run, export_run, plan_run, train_run, training
from gradrank.cli.main import main as gradrank
from gradrank.core import files, marker
from gradrank.lab import checkpoints
from gradrank.lab.trainer import Steps

assert demo_run
assert export_run
assert train_run
PLAN = ("plan", *TINY, "--batches", "2", "--budget", "1500")
TRAIN = ("train", *TINY, *SHORT, "--method", "uniform", "--budget", "uniform:1")
DYNAMIC = ("train", *TINY, "--method", "gard-dynamic", "--budget", "uniform:4", "--steps", "8")
DYNAMIC += ("--lr", "1e-2", "--eval-batches", "1", "--option", "interval=3", "--option", "window=6")
SAVING = ("--checkpoint-every", "1")

Hook = Callable[[], None]


def page(_records: Any, path: Path, overwrite: bool = False, **_more: Any) -> list[Path]:
    """Stand in for drawing; what is written goes the same way."""
    files.write_text(Path(path), "<html></html>", overwrite)
    return [Path(path)]


def forked(work: Callable[[], Any], log: Path, kill_after: float | None = None) -> dict[str, Any]:
    """Run in a child; return how it ended (negative: by that signal), what it said, how long."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        while time.monotonic() - started < kill_after and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return {"code": code, "said": log.read_text(), "seconds": time.monotonic() - started}


def verb(*args: Any) -> None:
    gradrank([str(arg) for arg in args])


_WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def moments(root: Path, act: Callable[[int, str], None]) -> None:
    """Call ``act(number, event)`` before each operation on files under a folder."""
    count = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in _WRITES:
            return
        if isinstance(args[0], str | Path) and str(args[0]).startswith(str(root)):
            count[0] += 1
            act(count[0], event)

    sys.addaudithook(hook)


def dying(root: Path, at: int) -> Hook:
    def act(number: int, _event: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: moments(root, act)


def full(root: Path, at: int, code: int = errno.ENOSPC) -> Hook:
    """From a moment on, nothing new fits on the disk; what is there can still be renamed."""

    def act(number: int, event: str) -> None:
        if number >= at and event in {"open", "os.mkdir", "os.link"}:
            raise OSError(code, os.strerror(code))

    return lambda: moments(root, act)


def counted(root: Path, result: Path) -> Hook:
    def act(number: int, _event: str) -> None:
        with open(result, "w") as stream:  # noqa: PTH123 - inside an audit hook, keep it plain
            stream.write(str(number))

    return lambda: moments(root, act)


def with_hook(hook: Hook | None, *args: Any) -> Callable[[], None]:
    def work() -> None:
        if hook is not None:
            hook()
        verb(*args)

    return work


def tree(folder: Path) -> dict[str, list[str]]:
    """Names under a folder, hidden and not."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    hidden = [name for name in names if any(part[0] == "." for part in Path(name).parts)]
    return {"seen": [name for name in names if name not in hidden], "hidden": hidden}


def no_room(_outputs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def broken_forward(fault: Callable[[Any], Any], steps: int) -> None:
    """Let a fault into every forward pass with gradients, once so many steps are done."""
    forward, end, done = LlamaForCausalLM.forward, Steps.on_step_end, [0]

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        return fault(outputs) if torch.is_grad_enabled() and done[0] >= steps else outputs

    def count(self: Steps, *args: Any, **kwargs: Any) -> None:
        end(self, *args, **kwargs)
        done[0] = self.done

    LlamaForCausalLM.forward = broken
    Steps.on_step_end = count  # pyright: ignore[reportAttributeAccessIssue]


class Scenarios:
    """Each method is one scenario; it returns plain data for the tests to judge."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.chance = random.Random(7)

    def place(self) -> Path:
        self.number += 1
        place = self.folder / f"case-{self.number}"
        place.mkdir()
        return place

    def run(self, place: Path, work: Callable[[], Any], **more: Any) -> dict[str, Any]:
        return forked(work, self.folder / f"{place.name}.log", **more)

    def total(self, *args: Any) -> tuple[int, dict[str, Any]]:
        """Return how many moments a verb has, and how it ended undisturbed."""
        place, told = self.place(), self.folder / f"total-{self.number}"
        done = self.run(place, with_hook(counted(place, told), *args, "--out", place / "x"))
        return int(told.read_text()), done

    def some(self, count: int, total: int) -> list[int]:
        return sorted(self.chance.sample(range(1, total + 1), min(count, total)))

    # --- killed -------------------------------------------------------------------------------

    def killed_plan(self) -> list[dict[str, Any]]:
        """Allocate again from a measurement, over an older plan and without one."""
        source = self.place()
        measured = source / "x" / "measurement.safetensors"
        assert self.run(source, with_hook(None, *PLAN, "--out", source / "x"))["code"] == 0
        found = []
        for old in (False, True):
            base = ("plan", "--from", measured, "--budget", "900")
            total, _ = self.total(*base)
            # At the end, old and new change places: each of those moments.
            chosen = self.some(4, total)
            for at in sorted({*chosen, total - 2, *range(total, total + 5 * old)}):
                place = self.place()
                args = (*base, *(("--overwrite",) if old else ()), "--out", place / "x")
                if old:
                    self.run(place, with_hook(None, *base[:3], "--out", place / "x"))
                killed = self.run(place, with_hook(dying(place, at), *args))
                left = tree(place)
                again = self.run(place, with_hook(None, *base, "--overwrite", "--out", place / "x"))
                found.append(
                    {"old": old, "killed": killed, "left": left, "again": again, "end": tree(place)}
                )
        place = self.place()
        late = self.run(place, with_hook(None, *PLAN, "--out", place / "x"), kill_after=0.15)
        again = self.run(place, with_hook(None, *PLAN, "--overwrite", "--out", place / "x"))
        found.append(
            {"old": False, "killed": late, "left": tree(place), "again": again, "end": tree(place)}
        )
        return found

    def killed_train(self) -> list[dict[str, Any]]:
        """At sampled moments and at one random time; then resumed, or started again."""
        whole = (*TRAIN, *SAVING)
        total, done = self.total(*whole)
        moments_ = [*self.some(5, total), None]
        found = []
        for at in moments_:
            place = self.place()
            hook = None if at is None else dying(place, at)
            after = self.chance.uniform(0.3, 0.9) * done["seconds"] if at is None else None
            killed = self.run(
                place, with_hook(hook, *whole, "--out", place / "x"), kill_after=after
            )
            left = tree(place)
            again = self.run(place, with_hook(None, *whole, "--resume", "--out", place / "x"))
            fresh = None
            if again["code"] == 2:
                fresh = self.run(
                    place, with_hook(None, *whole, "--overwrite", "--out", place / "x")
                )
            record = json.loads((place / "x" / "record.json").read_text())
            found.append(
                {
                    "at": at,
                    "killed": killed,
                    "left": left,
                    "again": again,
                    "fresh": fresh,
                    "status": record["status"],
                    "steps": len(record["losses"]["train"]),
                }
            )
        return found

    def killed_replacing(self) -> list[dict[str, Any]]:
        """A run that replaces another is killed before its first checkpoint."""
        place = self.place()
        self.run(place, with_hook(None, *TRAIN, "--out", place / "x"))
        old = (place / "x" / "record.json").read_bytes()
        new = (*TRAIN, "--seed", "5", "--overwrite", "--out", place / "x")
        found = []
        for at in (1, 2, 5):
            killed = self.run(place, with_hook(dying(place, at), *new))
            # The next command of any kind that looks at the folder puts the old run back.
            again = self.run(place, with_hook(None, "train", "--resume", "--out", place / "x"))
            record = place / "x" / "record.json"
            same = record.is_file() and record.read_bytes() == old
            found.append({"killed": killed, "again": again, "same": same, "end": tree(place)})
        return found

    def killed_export(self) -> list[dict[str, Any]]:
        run = self.place()
        self.run(run, with_hook(None, *TRAIN, "--out", run / "x"))
        total, _ = self.total("export", run / "x")
        found = []
        for at in self.some(4, total):
            place = self.place()
            args = ("export", run / "x", "--out", place / "x")
            killed = self.run(place, with_hook(dying(place, at), *args))
            left = tree(place)
            again = self.run(place, with_hook(None, *args, "--overwrite"))
            found.append({"killed": killed, "left": left, "again": again, "end": tree(place)})
        return found

    # --- refused by the system ----------------------------------------------------------------

    def full_disk(self) -> list[dict[str, Any]]:
        """From a moment on nothing new can be written: every writer of every verb."""
        run = self.place()
        self.run(run, with_hook(None, *PLAN, "--out", run / "plan"))
        self.run(run, with_hook(None, *TRAIN, "--out", run / "x"))
        verbs = {
            "plan": ("plan", "--from", run / "plan" / "measurement.safetensors"),
            "train": (*TRAIN, *SAVING),
            "export": ("export", run / "x"),
        }
        found = []
        for name, args in verbs.items():
            total, _ = self.total(*args)
            for at in (1, *self.some(5 if name == "train" else 3, total - 3)):
                place = self.place()
                ended = self.run(place, with_hook(full(place, at), *args, "--out", place / "x"))
                left = tree(place)
                more = ("--resume",) if name == "train" else ("--overwrite",)
                again = self.run(place, with_hook(None, *args, *more, "--out", place / "x"))
                if again["code"] == 2:
                    again = self.run(
                        place, with_hook(None, *args, "--overwrite", "--out", place / "x")
                    )
                found.append({"verb": name, "ended": ended, "left": left, "again": again})
        return found

    def small_files(self) -> list[dict[str, Any]]:
        """A limit on the size of files stops a write in its middle, in Python and in Rust."""
        run = self.place()
        self.run(run, with_hook(None, *TRAIN, "--out", run / "x"))
        verbs = {
            "plan": (PLAN, 3000),
            "train": ((*TRAIN, *SAVING), 9000),
            "export": (("export", run / "x"), 2000),
        }
        found = []
        for name, (args, limit) in verbs.items():
            place = self.place()

            def work(args: Any = args, limit: int = limit, place: Path = place) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                verb(*args, "--quiet", "--out", place / "x")

            ended = self.run(place, work)
            found.append({"verb": name, "ended": ended, "left": tree(place)})
        return found

    def read_only(self) -> list[dict[str, Any]]:
        """Root may write anywhere, so the system's refusal is put in by hand."""
        found = []
        for args in (PLAN, TRAIN):
            place = self.place()
            hook = full(place, 1, errno.EROFS)
            ended = self.run(place, with_hook(hook, *args, "--quiet", "--out", place / "x"))
            found.append({"ended": ended, "left": tree(place)})
        return found

    # --- interrupted, diverged, out of memory, out of time ----------------------------------------

    def interrupted(self) -> list[dict[str, Any]]:
        """Ctrl-C once and twice, in the middle of writing."""
        found = []
        for args, times in ((PLAN, 1), (PLAN, 2), ((*TRAIN, *SAVING), 1), ((*TRAIN, *SAVING), 2)):
            place = self.place()
            first = 6 if args is PLAN else 30

            def act(number: int, _event: str, first: int = first, times: int = times) -> None:
                if first <= number < first + times:
                    os.kill(os.getpid(), signal.SIGINT)

            def hook(place: Path = place, act: Any = act) -> None:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                moments(place, act)

            ended = self.run(place, with_hook(hook, *args, "--out", place / "x"))
            left = tree(place)
            more = ("--resume",) if args is not PLAN else ("--overwrite",)
            again = self.run(place, with_hook(None, *args, *more, "--out", place / "x"))
            found.append({"times": times, "ended": ended, "left": left, "again": again})
        return found

    def diverged(self) -> list[dict[str, Any]]:
        """A loss that is no number at step 3: static and dynamic, with checkpoints before it."""
        return [self._broken(args, self._nan) for args in (TRAIN, DYNAMIC)]

    def no_memory(self) -> list[dict[str, Any]]:
        """Memory runs out in the third step, and while measuring."""
        found = [self._broken(args, self._memory) for args in (TRAIN, DYNAMIC)]
        place = self.place()

        def work() -> None:
            broken_forward(no_room, steps=0)
            verb(*PLAN, "--out", place / "x")

        ended = self.run(place, work)
        return [*found, {"ended": ended, "left": tree(place), "whole": None, "again": None}]

    def _broken(self, args: Any, fault: Hook) -> dict[str, Any]:
        place = self.place()

        def work() -> None:
            fault()
            verb(*args, *SAVING, "--out", place / "x")

        ended = self.run(place, work)
        last = checkpoints.last_complete(place / "x" / "checkpoints")
        status = json.loads((place / "x" / "record.json").read_text())["status"]
        again = self.run(place, with_hook(None, "train", "--resume", "--out", place / "x"))
        whole = None if last is None else last.name
        return {"ended": ended, "left": tree(place), "whole": whole, "again": again, "as": status}

    @staticmethod
    def _nan() -> None:
        def poison(outputs: Any) -> Any:
            outputs.loss = outputs.loss * float("nan")
            return outputs

        broken_forward(poison, steps=2)

    @staticmethod
    def _memory() -> None:
        broken_forward(no_room, steps=2)

    def clock(self) -> dict[str, Any]:
        """The wall clock runs backwards, and files are stamped in the wrong order."""
        place = self.place()

        def work() -> None:
            began = time.time()
            time.time = lambda: began - 1e5 * (time.monotonic() % 1e3)
            verb(*TRAIN, *SAVING, "--out", place / "x")

        ended = self.run(place, work)
        saved = sorted((place / "x" / "checkpoints").iterdir(), key=lambda p: len(p.name))
        for age, folder in enumerate(sorted(saved)):
            os.utime(folder, (1e9 - 1e4 * age, 1e9 - 1e4 * age))
        last = checkpoints.last_complete(place / "x" / "checkpoints")
        record = json.loads((place / "x" / "record.json").read_text())
        return {"ended": ended, "record": record, "last": None if last is None else last.name}

    # --- two at once ------------------------------------------------------------------------------

    def two_at_once(self) -> list[dict[str, Any]]:
        """One run is held in the middle of its writing while others come for its folder."""
        found = []
        for args, held_at in (((*TRAIN, *SAVING), 30), (PLAN, 8)):
            place = self.place()
            here, go = self.folder / f"{place.name}.here", self.folder / f"{place.name}.go"

            def act(
                number: int, _event: str, here: Path = here, go: Path = go, at: int = held_at
            ) -> None:
                if number == at:
                    here.touch()
                    while not go.exists():
                        time.sleep(0.01)

            first = os.fork()
            if first == 0:
                log = self.folder / f"{place.name}-first.log"
                hook = lambda place=place, act=act: moments(place, act)  # noqa: E731
                inner = forked(with_hook(hook, *args, "--out", place / "x"), log)
                (self.folder / f"{place.name}.first").write_text(json.dumps(inner))
                os._exit(0)
            while not here.exists():
                time.sleep(0.01)
            others = [
                self.run(place, with_hook(None, *args, *more, "--out", place / "x"))
                for more in (
                    (),
                    ("--overwrite",),
                    *((("--resume",),) if args[0] == "train" else ()),
                )
            ]
            go.touch()
            os.waitpid(first, 0)
            told = json.loads((self.folder / f"{place.name}.first").read_text())
            found.append({"first": told, "others": others, "end": tree(place)})
        return found

    # --- damaged ----------------------------------------------------------------------------------

    def damaged(self) -> list[dict[str, Any]]:
        """Checkpoints of a dynamic run that lie, though their markers agree with them."""
        place, other = self.place(), self.place()
        self.run(place, with_hook(None, *DYNAMIC, *SAVING, "--out", place / "x"))
        strange = ("--budget", "uniform:3")
        self.run(other, with_hook(None, *DYNAMIC, *SAVING, *strange, "--out", other / "x"))
        static = self.place()
        self.run(static, with_hook(None, *TRAIN, *SAVING, "--steps", "8", "--out", static / "x"))
        (place / "x" / "record.json").unlink()
        return [self._with(place, name, *lie) for name, lie in lies(other, static).items()]

    def _with(self, place: Path, name: str, lie: Callable[[Path], None], seal: bool) -> Any:
        copy = self.place()
        shutil.copytree(place / "x", copy / "x")
        # A run that was killed before its last step, so that it has to go on.
        shutil.rmtree(copy / "x" / "checkpoints" / "checkpoint-8")
        for folder in (copy / "x" / "checkpoints").iterdir():
            lie(folder)
            if seal:
                (folder / marker.MARKER).unlink()
                marker.seal(folder)
        ended = self.run(copy, with_hook(None, "train", "--resume", "--out", copy / "x"))
        return {"name": name, "ended": ended}


Lie = Callable[[Path], None]


def without(key: str) -> Lie:
    def lie(folder: Path) -> None:
        facts, tensors = sidecar.read(folder / sidecar.FILE)
        facts.pop(key, None)
        kept = {k: v for k, v in tensors.items() if not k.startswith(key)}
        sidecar.write(folder / sidecar.FILE, facts, kept)

    return lie


def taken(source: Path, *names: str) -> Lie:
    """Files from the same checkpoint of another run; no names: all of it."""

    def lie(folder: Path) -> None:
        theirs = source / "x" / "checkpoints" / folder.name
        if not names:
            shutil.rmtree(folder)
            shutil.copytree(theirs, folder)
        for name in names:
            (folder / name).write_bytes((theirs / name).read_bytes())

    return lie


def reshape(folder: Path) -> None:
    facts, tensors = sidecar.read(folder / sidecar.FILE)
    wrong = {key: value.reshape(-1)[:1] for key, value in tensors.items()}
    sidecar.write(folder / sidecar.FILE, facts, wrong)


def rename(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({f"other.{key}": value for key, value in load_file(path).items()}, path)


def flip(folder: Path) -> None:
    path = folder / sidecar.FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_off(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 500)


def no_state(folder: Path) -> None:
    (folder / checkpoints.STATE).write_text("[1]")


def lies(other: Path, static: Path) -> dict[str, tuple[Lie, bool]]:
    """By name: what is done to each checkpoint, and whether its marker is made to agree."""
    return {
        "bit flipped": (flip, False),
        "checkpoint of another run": (taken(other), False),
        "sidecar of another run": (taken(other, sidecar.FILE), True),
        "adapter of another run": (taken(static, "adapter_model.safetensors"), True),
        "without its ranks": (without("ranks"), True),
        "without its step": (without("step"), True),
        "of other shapes": (reshape, True),
        "weights of another model": (rename, True),
        "optimizer cut off": (cut_off, False),
        "state of no run": (no_state, True),
    }


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for module in (training, plan_run, demo_run):
        module.write_report = page
    for name in names:
        place = folder / name
        place.mkdir()
        found = getattr(Scenarios(place), name)()
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
