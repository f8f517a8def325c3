"""Turn what packages carry into plain transformers folders and JSON lines. Each runs once.

A converter takes the folder with the unpacked members and an empty folder for the result.
"""

import contextlib
import io
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    LlamaConfig,
)

from gradrank.core.errors import DataError
from gradrank.lab.unpack import read_inner

REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and progress bars of libraries off the terminal.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def smollm2(raw: Path, target: Path) -> None:
    """Dequantise the GGUF file into a float32 Llama folder with its tokenizer.

    Args:
        raw: Holds ``model.gguf``.
        target: Receives the folder's files.
    """
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file="model.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(
            raw, gguf_file="model.gguf", dtype=torch.float32
        )
        # transformers 5 leaves a dequantised model marked as quantised, and then refuses to save
        # it: write its tensors and a configuration without the mark.
        config = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            config.pop(key, None)
        config["architectures"] = ["LlamaForCausalLM"]
        LlamaConfig(**config).save_pretrained(target)
        tokenizer.save_pretrained(target)
    weights = {name: value.contiguous() for name, value in loaded.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]  # the embedding itself; a file holds a tensor once
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def minilm(raw: Path, target: Path) -> None:
    """Take the folder as it is: it is a transformers folder already.

    Args:
        raw: Holds the files.
        target: Receives them.
    """
    for path in sorted(raw.iterdir()):
        shutil.copyfile(path, target / path.name)


def dinov2(raw: Path, target: Path) -> None:
    """Take the DINOv2-small backbone out of an ONNX file; its saliency decoder is left behind.

    Biases, norms and the patch embedding keep their names in the file. The weights of linear
    layers are anonymous there: the name of the node that multiplies by one tells the module, and
    it is stored transposed.

    Args:
        raw: Holds ``model.onnx``.
        target: Receives the folder's files.
    """
    import onnx  # pyright: ignore[reportMissingImports] - truly optional: only this asset needs it
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

    graph = onnx.load(str(raw / "model.onnx")).graph
    tensors: dict[str, Any] = {
        item.name: torch.tensor(numpy_helper.to_array(item).copy()) for item in graph.initializer
    }
    weights = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        match = re.search(r"/backbone/(.*)/MatMul", node.name) if node.op_type == "MatMul" else None
        if match:
            for name in node.input:
                if name in tensors and tensors[name].ndim == 2:
                    weights[match[1].replace("/", ".") + ".weight"] = tensors[name].T
    weights["embeddings.position_embeddings"] = torch.cat(
        [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], dim=1
    )
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    ).save_pretrained(target)
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    # 112 px keeps 8 x 8 patches of 14 px: enough to learn from small pictures, quick on a CPU.
    BitImageProcessorPil(
        do_resize=True,
        size={"height": 112, "width": 112},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(target)


def movie_reviews(raw: Path, target: Path) -> None:
    """Turn the rated movie-review sentences into JSON lines with ``text`` and ``rating``.

    Args:
        raw: Holds ``reviews.tar.gz``.
        target: Receives ``sentences.jsonl``.

    Raises:
        DataError: If a line has not the three expected fields.
    """
    content = read_inner((raw / "reviews.tar.gz").read_bytes(), REVIEWS, limit=16 * 2**20)
    lines = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        parts = line.split("\t")
        if len(parts) != 3:
            raise DataError(f"'{REVIEWS}' line {number} has {len(parts)} fields, expected 3.")
        row = {"text": parts[2].strip(), "rating": float(parts[1])}
        lines.append(json.dumps(row, ensure_ascii=False))
    (target / "sentences.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
