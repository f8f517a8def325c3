"""Exports an adapter to llama.cpp and compares the real engine with the trained model.

Usage: python benchmarks/proof_llamacpp.py --llama-cpp DIR [--adapter FOLDER] [--base-gguf FILE]
           [--python PYTHON]

Needs the package xllamacpp (llama.cpp in this process), and of a llama.cpp source folder the two
converters with what they import (sentencepiece). With ``--python``, an interpreter that has
llama-cpp-python, that engine runs instead, and raw logits are compared. Steps:

1. the base model becomes a GGUF file in float32, by llama.cpp's converter unless one is given;
2. the adapter is exported by gradrank, and the PEFT folder beside it converted by llama.cpp's own
   converter: both files must hold the same tensors and the same alpha;
3. the engine runs with either of them, with no adapter, and with what its converter makes of the
   ordinary PEFT save. Printed is the largest difference from transformers in the log-probability
   (the logit, with ``--python``) of any token of the vocabulary after every prefix of a text.

Everything is in single precision unless ``--dtype`` says otherwise. Without ``--adapter``, random
factors with mixed ranks and several alphas stand for a trained one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import PeftModel
from torch import Tensor

import gradrank as gr
from gradrank.core.budget import Budget
from gradrank.core.errors import GradrankError
from gradrank.core.files import write_json
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.lab.models import resolve_model
from gradrank.serving.installing import load_adapter
from gradrank.signals.facts import find_targets, model_facts

TEXT = "The film begins slowly, and then its second half turns into something rare: a comedy that"
RANKS = (4, 0, 1, 8, 2, 3, 16)


def main() -> int:
    """Run the proof; 1 if the tensors differ or the engine is far from the trained model."""
    args = parse()
    with tempfile.TemporaryDirectory(prefix="proof-") as held:
        try:
            result = prove(args, Path(held))
        except GradrankError as error:
            print(error, file=sys.stderr)
            return 2
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=2))
    good = result["difference"]["adapter.gguf"] <= 20 * result["difference"]["base"] + 1e-4
    return 0 if result["same_tensors"] and (good or args.dtype != "float32") else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR",
                        help="llama.cpp's sources, for its converters")  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m", help="name or folder of the base model")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER",
                        help="a stock PEFT adapter; default: random factors")  # fmt: skip
    parser.add_argument("--base-gguf", type=Path, metavar="FILE", help="the base model, converted")
    parser.add_argument("--python", metavar="PYTHON", help="interpreter with llama-cpp-python")
    parser.add_argument("--dtype", default="float32", help="of the exported factors")
    parser.add_argument("--tokens", type=int, default=12, help="length of the text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args()


def prove(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return everything that was found."""
    loaded = resolve_model(args.model, "lm", dtype="float32", device="cpu")
    model: Any = loaded.model.eval()
    base = work / "base"
    # Converting an adapter takes no more than the configuration.
    (model.config if args.base_gguf else model).save_pretrained(base)
    loaded.tokenizer.save_pretrained(base)
    ids = loaded.tokenizer(TEXT)["input_ids"][: args.tokens]
    raw = args.python is not None
    plain = reference(model, ids, raw)
    gguf = args.base_gguf or convert(args, "convert_hf_to_gguf.py", work / "base.gguf", base)
    peft = load_adapter(model, args.adapter) if args.adapter else random_adapter(model)
    trained = reference(peft, ids, raw)
    report = gr.export(peft, work / "out", "llama.cpp", dtype=args.dtype)
    peft.save_pretrained(work / "ordinary")
    options = ("--base", str(base))
    again = convert(args, "convert_lora_to_gguf.py", work / "again.gguf", work / "out", *options)
    ordinary = convert(args, "convert_lora_to_gguf.py", work / "ordinary.gguf",
                       work / "ordinary", *options)  # fmt: skip
    run = RawRunner(args.python, gguf, ids, work) if raw else Runner(gguf, ids, len(plain[0]))
    ours = run(work / "out" / "adapter.gguf")
    return {
        "engine": run.version,
        "compared": "logits" if raw else "log-probabilities",
        "model": args.model,
        "adapter": str(args.adapter.name) if args.adapter else "random",
        "dtype": args.dtype,
        "ranks": f"{min(report.ranks.values())} to {max(report.ranks.values())}",
        "modules": len(report.ranks),
        "positions": len(ids),
        "same_tensors": same(work / "out" / "adapter.gguf", again),
        "bytes": (work / "out" / "adapter.gguf").stat().st_size,
        "effect": distance(trained, plain),
        "double_check": report.difference,
        "difference": {
            "base": distance(run(None), plain),
            "adapter.gguf": distance(ours, trained),
            "converted from the exported folder": distance(run(again), trained),
            "converted from the ordinary save": distance(run(ordinary), trained),
        },
        "agreement": float((ours.argmax(1) == trained.argmax(1)).float().mean()),
    }


def random_adapter(model: Any) -> PeftModel:
    """Return the model with random factors: mixed ranks, some 0, one scale, so many alphas."""
    targets = [t for t in find_targets(model, "all-linear") if t.name != "lm_head"]
    planned = tuple(PlannedTarget(t, RANKS[i % len(RANKS)]) for i, t in enumerate(targets))
    spent = sum(item.parameters for item in planned)
    facts = model_facts(model, "all-linear")
    plan = Plan("random", {}, Budget.parameters(spent), spent, planned, provenance=facts)
    made: Any = gr.apply(plan, model).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=generator)
    return made


def convert(args: argparse.Namespace, program: str, out: Path, source: Path, *more: str) -> Path:
    """Run one of llama.cpp's converters."""
    command = [sys.executable, str(args.llama_cpp / program), *more, "--outtype", "f32",
               "--outfile", str(out), str(source)]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise GradrankError(f"{program} failed: {done.stderr.strip().splitlines()[-1]}")
    return out


@torch.no_grad()
def reference(model: Any, ids: list[int], raw: bool) -> Tensor:
    """Return transformers' logits or log-probabilities, ``[tokens, vocabulary]``."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits if raw else logits.log_softmax(-1)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference."""
    return float((one - other).abs().max())


def same(one: Path, other: Path) -> bool:
    """Return whether two adapters hold the same tensors and the same alpha."""
    files = [GGUFReader(path) for path in (one, other)]
    alphas = [file.fields["adapter.lora.alpha"].contents() for file in files]
    tensors = [
        {t.name: dequantize(np.asarray(t.data), t.tensor_type) for t in file.tensors}
        for file in files
    ]
    return (
        alphas[0] == alphas[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(np.array_equal(data, tensors[1][name]) for name, data in tensors[0].items())
    )


# What runs in the other interpreter: an argument per file, and the tokens.
RAW = """
import sys, llama_cpp, numpy
base, adapter, out, *ids = sys.argv[1:]
model = llama_cpp.Llama(base, lora_path=adapter or None, logits_all=True, n_ctx=256, n_threads=1,
                        n_threads_batch=1, type_k=0, type_v=0, flash_attn=False, verbose=False)
model.eval([int(i) for i in ids])
numpy.save(out, numpy.array(model.scores[: len(ids)]))
print(llama_cpp.__version__)
"""


class RawRunner:
    """llama-cpp-python on one base model and one text."""

    def __init__(self, python: str, base: Path, ids: list[int], work: Path) -> None:
        self.python, self.base, self.ids, self.work = python, base, ids, work
        self.version = "llama-cpp-python"

    def __call__(self, adapter: Path | None) -> Tensor:
        """Return the engine's logits after every prefix, with an adapter or without."""
        out = self.work / "logits.npy"
        command = [self.python, "-c", RAW, str(self.base), str(adapter or ""), str(out)]
        command += [str(token) for token in self.ids]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise GradrankError(f"llama-cpp-python failed: {done.stderr.strip()[-300:]}")
        self.version = f"llama-cpp-python {done.stdout.split()[-1]}"
        return torch.from_numpy(np.load(out))


class Runner:
    """xllamacpp on one base model and one text."""

    def __init__(self, base: Path, ids: list[int], vocabulary: int) -> None:
        self.base, self.ids, self.vocabulary = base, ids, vocabulary
        self.version = f"xllamacpp {version('xllamacpp')}"

    def __call__(self, adapter: Path | None) -> Tensor:
        """Return the engine's log-probabilities after every prefix, with an adapter or without."""
        import xllamacpp as engine

        options = engine.CommonParams()
        options.model.path = str(self.base)
        options.n_ctx = options.n_batch = 256
        options.n_parallel = 1
        options.n_gpu_layers = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup = False
        options.verbosity = -1
        options.cache_type_k = options.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            one = engine.CommonAdapterLoraInfo()
            one.path, one.scale = str(adapter), 1.0
            options.lora_adapters = [one]
        server = engine.Server(options)
        return torch.stack([self._next(server, end + 1) for end in range(len(self.ids))])

    def _next(self, server: Any, length: int) -> Tensor:
        request = {"prompt": self.ids[:length], "max_tokens": 1, "temperature": 0.0,
                   "logprobs": self.vocabulary, "cache_prompt": False,
                   "logit_bias": [[self.ids[0], 1e6]]}  # fmt: skip
        answer = server.handle_completions(request)
        found = torch.full((self.vocabulary,), float("nan"))
        for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[item["id"]] = item["logprob"]
        return found


if __name__ == "__main__":
    sys.exit(main())
