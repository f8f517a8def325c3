"""One of two processes dies: the other ends with an error in bounded time."""

import signal
from pathlib import Path

import pytest

from gradrank.adapters import sidecar
from gradrank.core import marker
from launching import start_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]
PATIENCE = 240


@pytest.mark.parametrize(("moment", "last"), [("step", "checkpoint-2"), ("save", "checkpoint-2")])
def test_the_other_process_ends_and_no_half_checkpoint_counts(
    tmp_path: Path, moment: str, last: str
) -> None:
    worker = Path(__file__).with_name("crash_worker.py")
    first, second = start_ranks(worker, str(tmp_path / "out"), moment)
    try:
        first.wait(PATIENCE)
        second.wait(PATIENCE)
    finally:
        first.kill()
        second.kill()
    assert second.code == -signal.SIGKILL
    assert first.code not in {0, -signal.SIGKILL}
    said = first.stderr
    assert "Connection closed" in said or "Gloo" in said or "gloo" in said, said[-2000:]
    whole = marker.last_complete(tmp_path / "out", sidecar.FILE)
    assert whole is not None
    assert whole.name == last
