"""Run records: plain data that survives, and malformed ones that do not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import gradrank as gr

A_DECISION: dict[str, Any] = {
    "step": 50,
    "parameters": 96,
    "budget": 100,
    "moved": 12,
    "changed": 2,
    "seconds": 0.25,
    "effective_rank": {"a": 5.0},
    "smoothed": {"a": 4.5},
    "energy": {"a": 0.125},
}


A_PRUNING: dict[str, Any] = {
    "step": 60,
    "parameters": 96,
    "budget": 100,
    "importance": {"a": -2.5, "b": 0.0},
    "passes": 12.0,
    "attributed": -0.25,
    "loss_change": 0.125,
    "gap": 1e6,
}


NEURONS: dict[str, Any] = {
    "step": 20,
    "looks": 2,
    "interval": 10,
    "rule": "majority",
    "targets": {
        "a": {
            "d_out": 5,
            "rank": 8,
            "supplementary_rank": 1,
            "dominant_rows": 2,
            "dominant": "11",
            "looks": 2,
            "hits": [1, 2, 2],
        }
    },
    "maps": {"a": {"rows": 5, "columns": 3, "before": [[0.0, 1e-9]], "after": [[2, 0.5]]}},
}


def of_target(**change: Any) -> dict[str, Any]:
    """Return neurons whose only target is changed; a key with ... is left out."""
    entry = {**NEURONS["targets"]["a"], **change}
    kept = {key: value for key, value in entry.items() if value is not ...}
    return {"neurons": {**NEURONS, "targets": {"a": kept}}}


def of_map(**change: Any) -> dict[str, Any]:
    return {"neurons": {**NEURONS, "maps": {"a": {**NEURONS["maps"]["a"], **change}}}}


def a_record(**fields: Any) -> gr.RunRecord:
    return gr.RunRecord(
        **{
            "name": "gard",
            "kind": "train",
            "created": "2026-01-02T03:04:05Z",
            "config": {"method": "gard", "options": {"energy": 0.9}},
            "seeds": {"run": 1, "calibration": 0},
            "losses": {"train": [[1, 2.5], [2, 2.25]], "eval": [[2, 2.0]]},
            "ranks_over_time": [[0, {"a": 2}]],
            "metrics": {"perplexity": 7.5},
            **fields,
        }
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = a_record(plan={"schema": "gradrank.plan/1"}, measurement={"targets": {}})
    record.save(path)
    assert gr.RunRecord.load(path) == record
    assert json.loads(path.read_text())["schema"] == "gradrank.record/1"
    with pytest.raises(gr.OutputError, match="exists"):
        record.save(path)
    record.save(path, overwrite=True)


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    record = a_record(
        metrics={"perplexity": math.inf, "loss": math.nan},
        losses={"train": [[1, math.nan]]},
        config={"nested": {"x": (1.0, -math.inf)}},
    )
    record.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["metrics"] == {"perplexity": None, "loss": None}
    assert data["losses"] == {"train": [[1, None]]}
    assert data["config"] == {"nested": {"x": [1.0, None]}}
    assert gr.RunRecord.load(tmp_path / "r.json").metrics["loss"] is None


def test_defaults_make_a_whole_record() -> None:
    record = gr.RunRecord("x", "plan")
    assert gr.RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.status == "finished"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "gradrank.plan/1"}, "found 'gradrank.plan/1'"),
        ({"status": "done"}, "status 'done'; known: finished"),
        ({"status": ["finished"]}, "status"),
        ({"surprise": 1}, r"unknown fields \['surprise'\]"),
        ({"name": 3}, "'name'"),
        ({"name": None}, "'name'"),
        ({"kind": ["train"]}, "'kind'"),
        ({"created": 5}, "'created'"),
        ({"config": None}, "'config' must be an object"),
        ({"environment": "linux"}, "'environment' must be an object"),
        ({"seeds": [1]}, "'seeds' must be an object"),
        ({"losses": [1]}, "'losses' must be an object"),
        ({"losses": {"train": 3}}, "'losses'"),
        ({"losses": {"train": [3]}}, "'losses'"),
        ({"losses": {"train": [["a", 3]]}}, "'losses'"),
        ({"losses": {"train": [[1, 2, 3]]}}, "'losses'"),
        ({"metrics": 3}, "'metrics' must be an object"),
        ({"cost": "much"}, "'cost' must be an object"),
        ({"trainable_parameters": 3}, "'trainable_parameters' must be an object"),
        ({"plan": [1]}, "'plan' must be an object or null"),
        ({"measurement": 5}, "'measurement' must be an object or null"),
        ({"ranks_over_time": {"a": 1}}, "'ranks_over_time'"),
        ({"decisions": None}, "'decisions' must be a list"),
        ({"decisions": {"step": 1}}, "'decisions' must be a list"),
        ({"decisions": [3]}, "'decisions', entry 1: it must be an object with a step, and is 3"),
        ({"decisions": [[5, {"a": 1}]]}, "'decisions', entry 1: it must be an object"),
        ({"decisions": [{"parameters": 1}]}, "'decisions'.*with a step"),
        ({"decisions": [{"step": None}]}, "'decisions'.*with a step"),
        ({"decisions": [A_DECISION, {"step": -1}]}, "entry 2: 'step' must be.*, and is -1"),
        ({"decisions": [{"step": 1.5}]}, "'decisions'"),
        ({"decisions": [{"step": True}]}, "'decisions'"),
        ({"decisions": [{"step": 1, "moved": "much"}]}, "'decisions'.*moved"),
        ({"decisions": [{"step": 1, "seconds": "2"}]}, "'decisions'"),
        ({"decisions": [{"step": 1, "energy": [1.0]}]}, "'decisions'.*energy"),
        ({"decisions": [{"step": 1, "energy": None}]}, "'decisions'.*energy"),
        ({"decisions": [{"step": 1, "smoothed": {"a": "x"}}]}, "'decisions'.*smoothed"),
        ({"decisions": [{"step": 1, "effective_rank": {"a": [1]}}]}, "'decisions'"),
        ({"decisions": [{"step": 1, "energy": {"a": math.nan}}]}, "'energy' of 'a'.*is nan"),
        ({"decisions": [{"step": 1, "importance": [2.0]}]}, "'importance' must be an object"),
        ({"decisions": [{"step": 1, "importance": {"a": True}}]}, "'importance' of 'a'.*is True"),
        ({"decisions": [{"step": 1, "importance": {"a": math.nan}}]}, "'a' must be a finite"),
        ({"decisions": [{"step": 1, "importance": {"a": -math.inf}}]}, "and is -inf"),
        (
            {"decisions": [{"step": 1, "gap": -0.1}]},
            "'gap'.*finite number of at least 0, and is -0",
        ),
        ({"decisions": [{"step": 1, "gap": math.nan}]}, "'gap' must be a finite .*, and is nan"),
        ({"decisions": [{"step": 1, "gap": "none"}]}, "'gap' must be a finite"),
        ({"decisions": [{"step": 1, "passes": -1}]}, "'passes' must be a finite.*at least 0"),
        ({"decisions": [{"step": 1, "attributed": math.inf}]}, "'attributed' must be a finite"),
        ({"decisions": [{"step": 1, "loss_change": "x" * 900}]}, "'loss_change'.*\\.\\.\\.\\.$"),
        ({"neurons": [1]}, "'neurons' must be an object or null"),
        ({"neurons": {"step": -1}}, "'neurons': 'step' must be a whole number"),
        ({"neurons": {"looks": 1.5}}, "'looks' must be a whole number of at least 0, and is 1.5"),
        ({"neurons": {"interval": True}}, "'interval'"),
        ({"neurons": {"rule": 3}}, "'rule' must be text, and is 3"),
        ({"neurons": {"targets": [1]}}, "'targets' must be an object by target"),
        ({"neurons": {"targets": {"a": 3}}}, "'targets' of 'a': it must be an object, and is 3"),
        ({"neurons": {"maps": "x"}}, "'maps' must be an object by target"),
        (of_target(d_out=0), "'d_out' must be a whole number of at least 1"),
        (of_target(d_out=...), "'d_out' .*, and is None"),
        (of_target(d_out=True), "'d_out'"),
        (of_target(d_out=1 << 30, dominant_rows=...), "the most"),
        (of_target(dominant="zz"), "'dominant' must be a hexadecimal number of at most 2 digits"),
        (of_target(dominant="0x1"), "'dominant' must be a hexadecimal"),
        (of_target(dominant="-1"), "'dominant' must be a hexadecimal"),
        (of_target(dominant="1_1"), "'dominant' must be a hexadecimal"),
        (of_target(dominant=""), "'dominant' must be a hexadecimal"),
        (of_target(dominant=17), "'dominant' must be a hexadecimal.*, and is 17"),
        (of_target(dominant="f" * 10**6), "'dominant' must be.*\\.\\.\\.\\.$"),
        (of_target(dominant="21"), "'targets' of 'a': .*5 rows names row 5 as dominant"),
        (of_target(rank=0), "'targets' of 'a': .*rank 0"),
        (of_target(supplementary_rank=-1), "supplementary_rank -1"),
        (of_target(rank=...), "lacks 'rank'"),
        (of_target(dominant_rows=3), "'dominant_rows' is 3, but 'dominant' holds 2 rows"),
        (of_target(looks=-1), "'looks' must be"),
        (of_target(hits={"0": 5}), "'hits' must be a list of whole numbers"),
        (of_target(hits=[1, 2.0, 2]), "'hits' must be a list"),
        (of_target(hits=[1, -1, 5]), "'hits' must be a list"),
        (of_target(hits=[None, 3, 2]), "'hits' must be a list"),
        (of_target(hits=[3, 2]), "'hits' must have one entry more than looks \\(2\\), and has 2"),
        (of_target(looks=None), "'hits' must have one entry more than looks"),
        (of_target(hits=[1, 2, 3]), "'hits' must sum to d_out = 5, and sums to 6"),
        (of_map(rows=0), "'maps' of 'a': 'rows' must be a whole number of at least 1"),
        (of_map(columns=None), "'columns' must be a whole number of at least 1"),
        (of_map(before=3), "'before' must be a list of rows"),
        (of_map(before=[3]), "'before' must be a list of rows"),
        (of_map(after=[]), "'after' must be at most 5 rows of 3 cells"),
        (of_map(after=[[]]), "'after' must be at most"),
        (of_map(after=[[1.0], [1.0, 2.0]]), "'after' must be.*2 rows of 1 to 2"),
        (of_map(after=[[1.0]] * 6), "'after' must be at most 5 rows"),
        (of_map(rows=999, after=[[1.0]] * 129), "'after' must be at most 128 rows"),
        (of_map(columns=999, after=[[1.0] * 129]), "at most 5 rows of 128 cells"),
        (of_map(before=[[-1.0]]), "'before' must hold finite numbers of at least 0.*-1.0"),
        (of_map(before=[[math.inf]]), "'before' must hold finite"),
        (of_map(before=[["1"]]), "'before' must hold finite"),
        (of_map(before=[[True]]), "'before' must hold finite"),
    ],
)
def test_a_malformed_record_names_its_fault(change: dict[str, Any], says: str) -> None:
    data = {**a_record().to_dict(), **change}
    with pytest.raises(gr.DataError, match=says):
        gr.RunRecord.from_dict(data)


def test_decisions_survive_their_file(tmp_path: Path) -> None:
    ranks = [[0, {"a": 2, "b": 4}], [60, {"a": 2, "b": 0}]]
    record = a_record(decisions=[A_DECISION, A_PRUNING, {"step": 100}], ranks_over_time=ranks)
    record.save(tmp_path / "r.json")
    assert gr.RunRecord.load(tmp_path / "r.json") == record


def test_neurons_survive_their_file(tmp_path: Path) -> None:
    record = a_record(neurons=NEURONS)
    record.save(tmp_path / "r.json")
    assert gr.RunRecord.load(tmp_path / "r.json") == record
    assert gr.RunRecord.load(tmp_path / "r.json").neurons == NEURONS


def test_neurons_may_hold_what_json_lacks_and_what_a_later_version_adds(tmp_path: Path) -> None:
    odd = of_map(before=[[math.nan, 1.0]], after=None)["neurons"] | {"added_later": [1]}
    a_record(neurons=odd).save(tmp_path / "r.json")
    read = gr.RunRecord.load(tmp_path / "r.json").neurons
    assert read is not None
    assert read["maps"]["a"]["before"] == [[None, 1.0]]
    assert read["added_later"] == [1]
    for empty in ({}, {"targets": {}, "maps": {}}, {"targets": {}}, None):
        data = {**a_record().to_dict(), "neurons": empty}
        assert gr.RunRecord.from_dict(data).neurons == empty


def test_a_record_from_before_there_were_neurons_still_loads() -> None:
    data = a_record().to_dict()
    assert data.pop("neurons") is None
    assert gr.RunRecord.from_dict(data) == a_record()


def test_a_record_from_before_there_were_decisions_still_loads() -> None:
    data = a_record().to_dict()
    del data["decisions"]
    assert gr.RunRecord.from_dict(data) == a_record()
    assert gr.RunRecord.from_dict(data).decisions == []


def test_a_decision_may_hold_what_json_lacks_and_what_a_later_version_adds(tmp_path: Path) -> None:
    odd = {**A_DECISION, "seconds": math.nan, "energy": {"a": math.inf}, "added_later": [1]}
    gone = {**A_PRUNING, "gap": math.nan, "importance": {"a": math.nan}}
    a_record(decisions=[odd, gone]).save(tmp_path / "r.json")
    read = gr.RunRecord.load(tmp_path / "r.json").decisions
    assert read == [
        {**A_DECISION, "seconds": None, "energy": {"a": None}, "added_later": [1]},
        {**A_PRUNING, "gap": None, "importance": {"a": None}},
    ]


@pytest.mark.parametrize("missing", ["name", "kind", "schema"])
def test_a_record_without_its_essentials_is_refused(missing: str) -> None:
    data = a_record().to_dict()
    del data[missing]
    with pytest.raises(gr.DataError):
        gr.RunRecord.from_dict(data, "'r.json'")


@pytest.mark.parametrize("data", [None, 3, "x", [], {}])
def test_what_is_no_record_is_refused(data: Any) -> None:
    with pytest.raises(gr.DataError, match="no record"):
        gr.RunRecord.from_dict(data)


def test_files_that_are_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gr.DataError, match="does not exist"):
        gr.RunRecord.load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"schema": ')
    with pytest.raises(gr.DataError, match="not valid JSON"):
        gr.RunRecord.load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(gr.DataError, match=r"r\.json"):
        gr.RunRecord.load(tmp_path / "r.json")
