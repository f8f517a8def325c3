"""Run the scripts of ``examples/`` as a user does, on tiny models and data written here."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    RobertaConfig,
)

from gradrank.lab.tiny import TINY_MODELS, VOCABULARY, byte_tokenizer, image_processor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = ("the", "film", "is", "warm", "dull", "loud", "quiet", "long", "tale", "town")
CLASSES: dict[str, Any] = {
    "CAUSAL": AutoModelForCausalLM,
    "SEQ": AutoModelForSequenceClassification,
    "IMAGE": AutoModelForImageClassification,
}
HEADS = {"roberta": "SEQ", "vit": "IMAGE"}


def run(name: str, *arguments: object) -> None:
    """Call ``main`` of an example with command-line arguments."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))  # as for a script that is started there
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def tiny(folder: Path, name: str) -> Path:
    """Save a tiny model with its tokenizer or image processor: llama, gpt2, roberta or vit."""
    torch.manual_seed(0)
    config = _roberta() if name == "roberta" else TINY_MODELS[f"tiny-{name}"]()
    CLASSES[HEADS.get(name, "CAUSAL")].from_config(config).save_pretrained(folder)
    processor = image_processor() if name == "vit" else byte_tokenizer(name == "roberta")
    processor.save_pretrained(folder)
    return folder


def _roberta() -> PreTrainedConfig:
    return RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=140,
        type_vocab_size=2,
        pad_token_id=0,
        initializer_range=0.2,
    )


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=7))


def write_sentences(file: Path, count: int = 64) -> Path:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": sentence(rng)}) for _ in range(count)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def write_glue(folder: Path, count: int = 48) -> Path:
    """MRPC's columns, with its byte-order mark and its literal quotes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "dev"):
        rows = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for index in range(count):
            first, label = sentence(rng), index % 2
            second = first if label else f'"{sentence(rng)}'
            rows.append(f"{label}\t{index}\t{index + 1}\t{first}\t{second}")
        with gzip.open(folder / f"{part}.tsv.gz", "wt", encoding="utf-8-sig") as file:
            file.write("\n".join(rows) + "\n")
    return folder


def write_pictures(folder: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for index, name in enumerate(("dark", "grey", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 80, (20, 20, 3)) + 80 * index
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def ranks_on_disk(folder: Path) -> dict[str, int]:
    """Rank of every module that an adapter's file holds."""
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    return {
        key.removeprefix(prefix).removesuffix(suffix): tensor.shape[0]
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
        if key.endswith(suffix)
    }


def parameters_on_disk(folder: Path) -> int:
    weights = load_file(folder / "adapter_model.safetensors")
    return sum(tensor.numel() for key, tensor in weights.items() if ".lora_" in key)


def effect(base: Path, folder: Path, kind: str = "CAUSAL") -> float:
    """How much an adapter, loaded by stock PEFT, changes the logits of its base."""
    model = CLASSES[kind].from_pretrained(base)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(model, folder)
        return float((adapted(input_ids=ids).logits - before).abs().max())
