"""Peak memory of a phase."""

import mmap
import time

import pytest
import torch

from gradrank.lab import memory
from gradrank.lab.memory import PeakMemory

CPU = torch.device("cpu")
SIZE = 64 * 2**20


def touch(seconds: float) -> None:
    # Fresh pages, and not what an earlier test has left in the allocator.
    block = torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8).fill_(1)
    time.sleep(seconds)
    assert int(block[-1]) == 1


@pytest.mark.parametrize("sample", [False, True])
def test_a_large_block_shows(sample):
    with PeakMemory(CPU, sample) as nothing:
        time.sleep(0.1)
    with PeakMemory(CPU, sample) as much:
        touch(0.2)
    assert much.peak - nothing.peak > SIZE * 0.8
    with PeakMemory(CPU, sample) as after:
        time.sleep(0.1)
    assert after.peak < much.peak - SIZE * 0.5


def test_inner_phase_does_not_make_the_outer_one_forget():
    with PeakMemory(CPU) as outer:
        touch(0.05)
        with PeakMemory(CPU) as inner:
            time.sleep(0.05)
    assert outer.peak - inner.peak > SIZE * 0.8


def test_falls_back_to_sampling(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    with PeakMemory(CPU) as watched:
        touch(0.2)
    assert watched._thread is not None
    assert not watched._thread.is_alive()
    assert watched.peak > SIZE


def test_silent_system_gives_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nothing")
    with PeakMemory(CPU) as watched:
        pass
    assert watched.peak == 0


def test_an_error_ends_the_watch():
    with pytest.raises(ValueError, match="x"), PeakMemory(CPU, sample=True) as watched:
        raise ValueError("x")
    assert watched._thread is not None
    assert not watched._thread.is_alive()
    assert PeakMemory._active == []
