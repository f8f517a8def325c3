"""Adapters come from anywhere: whatever their files hold, they are read or refused in words."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import gradrank as gr
from cases import hand_plan, randomise_adapter, tiny_llama
from gradrank.core.errors import DataError, GradrankError
from gradrank.serving import facts as header
from gradrank.serving.facts import describe
from gradrank.serving.installing import load_adapter
from gradrank.serving.patterns import Patterns
from gradrank.serving.reading import read_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    base = tiny_llama()
    model = randomise_adapter(gr.apply(hand_plan(base), base))
    folder = tmp_path_factory.mktemp("honest") / "out"
    gr.export(model, folder)
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


@pytest.fixture
def folder(honest: tuple[bytes, bytes], tmp_path: Path) -> Path:
    found = tmp_path / "adapter"
    found.mkdir()
    (found / CONFIG).write_bytes(honest[0])
    (found / WEIGHTS).write_bytes(honest[1])
    return found


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def tensors(folder: Path, change: Any) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)


def raw(folder: Path, entries: dict[str, Any] | bytes, data: bytes = b"") -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_honest_one_is_read(folder: Path) -> None:
    assert describe(folder).parameters == read_adapter(folder).parameters > 0
    load_adapter(tiny_llama(), folder)


BOMBS = [r"(a+)+\d", r"(.|.)*\d", r"(.*.*.*.*.*.*.*.*)[^\w.]", r"(\w+\.?)+[!?]", r"((.*)*)*[bc]"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_expression_that_explodes_is_stopped(bomb: str) -> None:
    patterns = Patterns({bomb: 1}, "alpha_pattern", seconds=0.2)
    with pytest.raises(DataError, match="take longer than"):
        # The time is for all look-ups together.
        [patterns.find("a" * 200 + "." * (n % 3) + "a" * n, 0) for n in range(400)]


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "x" * 3000, "(?P<a", "[z-a]"])
def test_what_is_no_expression_is_refused(folder: Path, field: str, pattern: str) -> None:
    edit(folder, **{field: {pattern: 4}})
    with pytest.raises(DataError, match=field):
        describe(folder)


@pytest.mark.parametrize(
    "expression", [".*q_proj", r"^(model\.layers\.\d+\.self_attn\.(q|v)_proj)$", "x", "("]
)
def test_targets_as_an_expression_are_compared_not_trusted(folder: Path, expression: str) -> None:
    edit(folder, target_modules=expression)
    with pytest.raises(gr.PlanError, match="target"):
        load_adapter(tiny_llama(), folder)


FIELDS = [
    {"r": 0}, {"r": -3}, {"r": True}, {"r": "8"}, {"r": 10**400}, {"r": 2.5},
    {"lora_alpha": "x"}, {"lora_alpha": 10**400}, {"lora_alpha": [1]}, {"lora_alpha": 1e300},
    {"alpha_pattern": [1]}, {"rank_pattern": "q_proj"}, {"target_modules": 5},
    {"target_modules": [5]}, {"target_modules": {"a": 1}}, {"modules_to_save": ["../../etc"]},
    {"modules_to_save": [None]}, {"modules_to_save": "head"}, {"bias": "some"}, {"bias": 5},
    {"use_rslora": "yes"}, {"init_lora_weights": "/tmp/x"}, {"init_lora_weights": {"a": 1}},
    {"layer_replication": [[0, 4]]}, {"target_parameters": ["x"]}, {"kasa_config": {"a": 1}},
    {"peft_type": "PROMPT_TUNING"}, {"peft_type": ["LORA"]}, {"base_model_name_or_path": 7},
    {"task_type": ["CAUSAL_LM"]}, {"trainable_token_indices": "all"},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: next(iter(f)))
def test_fields_of_a_wrong_kind_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder, **fields)
    with pytest.raises(GradrankError):
        load_adapter(tiny_llama(), folder)
    with pytest.raises(GradrankError):
        read_adapter(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"peft_type": "LORA", "peft_type": "LORA"}', "[" * 100_000, "\x00",
     '{"peft_type": "LORA", "lora_alpha": NaN}', '{"peft_type": "LORA", "lora_alpha": 1e999}'],
)  # fmt: skip
def test_damaged_configurations_are_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(DataError):
        describe(folder)


NAMES = ["../../up", "a/b", "a..b", ".a", "a\nb", "a b", "", "\u0661.x", "a" * 600, "<b>", "a;b"]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_refused(folder: Path, name: str) -> None:
    a = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    b = {**a, "data_offsets": [4, 8]}
    raw(folder, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, bytes(8))
    with pytest.raises(DataError, match="no name of a parameter"):
        describe(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(folder: Path, share: float) -> None:
    path = folder / WEIGHTS
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match="damaged"):
        describe(folder)


def one(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = [
    (one([2**62, 4], [0, 8]), bytes(8)),
    (one([-1, 4], [0, 8]), bytes(8)),
    (one([1, 2], [0, 2**62]), bytes(8)),
    (one([1, 2], [8, 0]), bytes(8)),
    (one([1, 1], [0, 8], "I64"), bytes(8)),
    (one([1, 2], [0, 8], "F99"), bytes(8)),
    ({"x": 5}, b""),
    (b"not json", b""),
    (b'{"a":' * 50_000, b""),
]


@pytest.mark.parametrize(("entries", "data"), HEADERS, ids=range(len(HEADERS)))
def test_absurd_headers_are_refused(folder: Path, entries: Any, data: bytes) -> None:
    raw(folder, entries, data)
    with pytest.raises(DataError):
        describe(folder)


def test_a_huge_file_is_refused_before_it_is_read(folder: Path) -> None:
    # Sparse: it takes no room on the disk, but reading it would take a tebibyte of memory.
    os.truncate(folder / WEIGHTS, 2**40)
    with pytest.raises(DataError, match="more than half of this machine's memory"):
        describe(folder)


def test_a_huge_configuration_is_refused_before_it_is_read(folder: Path) -> None:
    os.truncate(folder / CONFIG, 2**40)
    with pytest.raises(DataError, match="larger than"):
        describe(folder)


def test_too_many_tensors_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MOST_TENSORS", 3)
    with pytest.raises(DataError, match="at most 3"):
        describe(folder)


def test_an_absurd_rank_is_refused(folder: Path) -> None:
    def grow(found: dict[str, torch.Tensor]) -> None:
        found[KEY] = torch.zeros(20_000, 32)
        found[KEY.replace("lora_A", "lora_B")] = torch.zeros(32, 20_000)

    tensors(folder, grow)
    with pytest.raises(DataError, match="rank 20,000"):
        describe(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    tensors(folder, lambda found: found[KEY].view(-1)[0].fill_(value))
    with pytest.raises(DataError, match=r"q_proj.lora_A.weight' holds NaN or infinity"):
        read_adapter(folder)


def test_shapes_that_do_not_fit_each_other_are_refused(folder: Path) -> None:
    tensors(folder, lambda found: found.update({KEY: torch.zeros(7, 32)}))
    with pytest.raises(DataError, match="do not fit"):
        describe(folder)


def test_a_factor_without_its_other_is_refused(folder: Path) -> None:
    tensors(folder, lambda found: found.pop(KEY.replace("lora_A", "lora_B")))
    with pytest.raises(DataError, match="factors of"):
        describe(folder)


def test_a_pickle_beside_it_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), folder / "adapter_model.bin")
    load_adapter(tiny_llama(), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(gr.PlanError, match="pickles are not read"):
        load_adapter(tiny_llama(), folder)
    assert not (tmp_path / "sprung").exists()


def test_reading_takes_bounded_memory(folder: Path) -> None:
    """A header that promises much, and a configuration of long lists, in 1 GiB of addresses."""
    raw(folder, b" " * (40 * 2**20), b"")
    edit(folder, target_modules=["m" * 100] * 100_000)
    program = textwrap.dedent(
        f"""
        import resource, sys
        from pathlib import Path
        from gradrank.core.errors import DataError
        from gradrank.serving.facts import describe
        assert "torch" not in sys.modules
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        try:
            describe(Path({str(folder)!r}))
        except DataError as error:
            print("refused:", error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "header of 40 MiB" in done.stdout


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)
KEYS = st.sampled_from(
    ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias", "use_dora",
     "modules_to_save", "init_lora_weights", "use_rslora", "peft_type", "task_type", "lora_bias",
     "trainable_token_indices", "fan_in_fan_out", "lora_dropout", "exclude_modules"]
)  # fmt: skip
FUZZ = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def attempt(base: nn.Module, folder: Path) -> None:
    before = [(name, type(module)) for name, module in base.named_modules()]
    told = "read and taken off again"
    try:
        load_adapter(base, folder).unload()
    except GradrankError as error:
        told = str(error)
    assert 10 < len(told) < 2000
    assert [(name, type(module)) for name, module in base.named_modules()] == before


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_any_configuration_is_read_or_refused(folder: Path, honest: Any, changes: Any) -> None:
    config = json.loads(honest[0]) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    attempt(tiny_llama(), folder)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    ),
    early=st.booleans(),
)
def test_any_weights_are_read_or_refused(
    folder: Path, honest: Any, changes: list[tuple[float, int]], early: bool
) -> None:
    data = bytearray(honest[1])
    # Half of the trials damage the header, which is where a reader can be led astray.
    span = 8 + struct.unpack("<Q", data[:8])[0] if early else len(data)
    for share, value in changes:
        data[int(share * span)] = value
    (folder / WEIGHTS).write_bytes(bytes(data))
    attempt(tiny_llama(), folder)
