"""Without the extras: what needs none of them works, the rest says in one message what is missing.

Each runs in a process of its own, in which the packages of the extras cannot be found.
"""

import subprocess
import sys

import pytest

EXTRAS = ("accelerate", "datasets", "filelock", "gguf", "psutil", "onnx", "bitsandbytes",
          "trl")  # fmt: skip
BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition('.')[0] in {EXTRAS!r} else self.finder.find_spec(name, *rest)
    def find_distributions(self, context):
        look = getattr(self.finder, 'find_distributions', lambda context: ())
        return () if str(context.name).lower() in {EXTRAS!r} else look(context)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def without_extras(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCK + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return without_extras(f"from gradrank.cli.main import main; main({list(args)!r})")


@pytest.mark.parametrize(
    "args", [("--help",), ("plan", "--help"), ("completion", "zsh"), ("methods", "dora", "--help")]
)
def test_what_needs_no_extra_works(args: tuple[str, ...]) -> None:
    done = command(*args)
    assert done.returncode == 0, done.stderr


def test_the_doctor_tells_what_is_missing() -> None:
    done = command("doctor", "--quick")
    assert done.returncode == 0, done.stderr
    for line in ("note datasets ", "note accelerate ", "gradrank[train]"):
        assert line in done.stdout


@pytest.mark.parametrize(
    "args",
    [("plan", "--model", "tiny-llama", "--task", "tiny-lm", "--out", "never-written"), ("tasks",)],
)
def test_what_needs_an_extra_names_it_and_how_to_get_it(args: tuple[str, ...]) -> None:
    done = command(*args)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "gradrank[train]" in done.stderr
