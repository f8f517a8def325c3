"""Benchmarks themselves, in this process, on one tiny model and a few steps."""

import argparse
from typing import Any

import pytest
from benchmarks.frame import Bench, parse, reached

from benchmarks import (
    bench_decide,
    bench_dynamic,
    bench_igu,
    bench_measure,
    bench_pilora,
    bench_resize,
    peers,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT's AdaLoRA, EVA and LoRA-GA


def flags(bench: Bench, *more: str) -> argparse.Namespace:
    return parse(bench, ["--quick", "--no-memory", *more])


def test_stages_of_pilora_train_side_by_side() -> None:
    args = flags(bench_pilora.BENCH, "--steps", "5", "--interval", "2")
    rows = bench_pilora.run(args).rows
    assert list(rows) == ["lora", "again", "partition", "scoring"]
    assert rows["lora"]["ratio"] == 1
    assert rows["partition"]["parameters"] < rows["lora"]["parameters"]
    assert rows["partition"]["held_bytes"] < rows["lora"]["held_bytes"]
    assert len(reached(bench_pilora.GOALS, rows)) == 2


def test_whole_runs_hold_their_decisions() -> None:
    found = bench_dynamic.run(flags(bench_dynamic.BENCH)).rows
    assert [d["step"] for d in found["gard-dynamic"]["decisions"]] == [5, 10]
    args = flags(bench_igu.BENCH, "--variants", "igu")
    rows = bench_igu.run(args).rows
    assert rows["igu"]["parameters_peak"] > rows["igu"]["parameters"]
    assert rows["igu"]["parameters"] <= rows["uniform"]["parameters"]
    assert rows["igu"]["held_bytes"] > rows["igu"]["held_bytes_in_the_end"]


def test_kinds_of_steps_follow_windows_and_phases() -> None:
    kind = bench_dynamic.kinds(argparse.Namespace(interval=5, window=3))
    assert [kind(step) for step in range(1, 6)] == ["plain"] * 2 + ["observed"] * 2 + ["decision"]
    args = argparse.Namespace(steps=20, interval=5, score_every=5)
    assert len({bench_igu.kinds(args)(step) for step in range(1, 21)}) == 6


def test_measuring_is_compared_with_training_and_with_bare_passes() -> None:
    rows = bench_measure.run(flags(bench_measure.BENCH)).rows
    assert rows["bare"]["ratio_to_bare"] == rows["lora"]["ratio"] == 1
    assert len(reached(bench_measure.GOALS, rows)) == 2  # memory was left out


def test_a_resize_comes_back_to_where_it_began() -> None:
    rows = bench_resize.run(flags(bench_resize.BENCH)).rows
    assert set(rows) == {"step", "resize", "rebuild"}


@pytest.mark.parametrize("way", ["gard", "waterfill", "peft-lora-ga"])
def test_ways_to_decide_say_what_they_keep(way: str) -> None:
    row: Any = bench_decide.part(flags(bench_decide.BENCH), way)
    assert row["seconds"] > 0
    assert row["stored_bytes"] > 0


def test_a_peer_that_is_absent_is_named_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "aletheia", "no-such-package")
    done = {"seconds": 1.0, "stored_bytes": 1}
    monkeypatch.setattr(bench_decide, "fresh", lambda *_: dict(done))
    args = flags(bench_decide.BENCH, "--ways", "aletheia", "--repeats", "2")
    found = bench_decide.run(args)
    assert list(found.rows) == ["gard"]
    assert "no-such-package" in found.skipped["aletheia"]
