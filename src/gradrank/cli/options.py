"""The flags of all verbs, each defined once; a verb names those that it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gradrank.cli import runfile
from gradrank.cli.training_flags import TRAINING_FLAGS
from gradrank.cli.verb import Flag, flag, switch

HEADS = ("lm", "classification", "image", "instruct")
Decorator = Callable[[Any], Any]

_COUNT = click.IntRange(min=1)
_SEED = click.IntRange(min=0, max=2**32 - 1)
_PATH = click.Path(path_type=Path)


_D, _M, _S, _R = "Model and data", "Method", "Batches and measuring", "Running"

_FLAGS: dict[str, Callable[[], Flag]] = {
    **TRAINING_FLAGS,
    "model": flag(
        _D,
        "--model",
        metavar="NAME",
        help="A folder, a name that needs no hub (smollm2-135m, minilm-l6, tiny-llama, ...), or a "
        "name on the model hub.",
    ),
    "task": flag(_D, "--task", metavar="NAME", help="A registered task: see 'gradrank tasks'."),
    "data": flag(
        _D,
        "--data",
        metavar="FILE",
        help="Your own data: .jsonl, .json, .csv, .tsv, .txt, .parquet (all but the last also "
        ".gz), a folder class/picture, or a public data set as NAME or NAME:CONFIGURATION.",
    ),
    "eval_data": flag(
        _D,
        "--eval-data",
        metavar="FILE",
        help="Evaluation split; default: every tenth example of --data is held out, at random.",
    ),
    "data_dir": flag(
        _D,
        "--data-dir",
        metavar="DIR",
        help="Folder with public data sets, for --task; the variable GRADRANK_DATA names one too.",
    ),
    "text_column": flag(
        _D, "--text-column", metavar="NAME", help="Column with the text, or the prompt."
    ),
    "label_column": flag(
        _D, "--label-column", metavar="NAME", help="Column with the class, or the completion."
    ),
    "image_column": flag(
        _D, "--image-column", metavar="NAME", help="Column with the path of a picture."
    ),
    "head": flag(
        _D, "--head", type=click.Choice(HEADS), help="What the model predicts; tasks know theirs."
    ),
    "max_length": flag(
        _D,
        "--max-length",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Longest sequence; for --head lm the length of every block. Default: 256, or less if "
        "the model has fewer positions.",
    ),
    "trust_remote_code": flag(
        _D,
        "--trust-remote-code",
        is_flag=True,
        default=False,
        show_default=False,
        callback=runfile.only_typed,
        help="Run code that comes with a hub model. Off unless you ask, here and not in a file.",
    ),
    "method": flag(_M, "--method", metavar="NAME", default="gard", help="See 'gradrank methods'."),
    "option": flag(
        _M,
        "--option",
        metavar="KEY=VALUE",
        multiple=True,
        help="An option of the method; may be repeated.",
    ),
    "budget": flag(
        _M,
        "--budget",
        metavar="BUDGET",
        default="uniform:8",
        help="Trainable adapter parameters: 200000, uniform:8 (what uniform LoRA of that rank "
        "costs), or 0.5% of the base model.",
    ),
    "targets": flag(
        _M,
        "--targets",
        metavar="NAMES",
        default="all-linear",
        help="all-linear, or module names with commas between (q_proj,v_proj), or re:EXPRESSION.",
    ),
    "preset": flag(
        _M,
        "--preset",
        metavar="NAME",
        is_eager=True,
        callback=runfile.use_preset,
        help="Settings of a published experiment (see 'gradrank methods --presets'); --config and "
        "flags override them.",
    ),
    "batches": flag(
        _S, "--batches", type=_COUNT, metavar="M", default=32, help="Mini-batches to measure."
    ),
    "batch_size": flag(
        _S, "--batch-size", metavar="N", type=_COUNT, default=8, help="Examples in a micro-batch."
    ),
    "accumulate": flag(
        _S,
        "--accumulate",
        metavar="N",
        type=_COUNT,
        default=1,
        help="Micro-batches in a mini-batch, and in a training step.",
    ),
    "checkpoint": flag(
        _S,
        "--checkpoint/--no-checkpoint",
        default=None,
        show_default=False,
        help="Measure with gradient checkpointing: far less memory, half as much work again. "
        "Default: only if --max-memory asks for it.",
    ),
    "max_memory": flag(
        _S,
        "--max-memory",
        metavar="BYTES",
        show_default=False,
        help="Cap on what measuring holds beyond the model, as 8GiB or 512MiB: met by "
        "checkpointing, then by several passes over the batches.",
    ),
    "calibration_seed": flag(
        _S,
        "--calibration-seed",
        metavar="N",
        type=_SEED,
        show_default=False,
        help="Seed of measuring. Default: --seed.",
    ),
    "seed": flag(
        _R,
        "--seed",
        metavar="N",
        type=_SEED,
        default=0,
        help="Seed of splits, adapters, data order, dropout.",
    ),
    "device": flag(_R, "--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1."),
    "dtype": flag(
        _R,
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Of the base weights; auto: bfloat16 on a GPU that has it, else float32.",
    ),
    "out": flag(
        _R, "--out", type=_PATH, metavar="DIR", show_default=False, help="Folder to write."
    ),
    "overwrite": switch(
        _R, "--overwrite", "Replace what stands at --out, if gradrank wrote all of it."
    ),
    "config": flag(
        _R,
        "--config",
        type=_PATH,
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        show_default=False,
        callback=runfile.use,
        help="YAML file with these flags as keys; flags given here override it.",
    ),
    "json": flag(
        _R,
        "--json",
        "as_json",
        is_flag=True,
        default=False,
        show_default=False,
        help="Print one JSON object on stdout, everything else on stderr.",
    ),
    "quiet": switch(_R, "--quiet", "Say nothing on stderr but warnings and errors."),
    "debug": flag(
        _R,
        "--debug",
        is_flag=True,
        expose_value=False,
        show_default=False,
        help="Print the traceback of an error.",
    ),
}

DATA = (
    "model", "task", "data", "eval_data", "data_dir", "text_column", "label_column", "image_column",
    "head", "max_length", "trust_remote_code",
)  # fmt: skip
METHOD = ("method", "option", "budget", "targets")
MEASURING = (
    "batches", "batch_size", "accumulate", "checkpoint", "max_memory", "calibration_seed",
)  # fmt: skip
TRAINING = (
    "steps", "epochs", "lr", "schedule", "warmup", "weight_decay", "lora_alpha", "lora_dropout",
    "eval_every", "eval_batches", "checkpoint_every", "gradient_checkpointing",
    "group_by_length", "workers",
)  # fmt: skip
RUNNING = ("preset", "seed", "device", "dtype", "out", "overwrite")
COMMON = ("config", "json", "quiet", "debug")


def flags(*names: str, **defaults: Any) -> Decorator:
    """Return a decorator that adds flags to a verb, in this order.

    Args:
        *names: Names of flags.
        **defaults: Other defaults than the usual ones.

    Returns:
        The decorator.
    """

    def add(function: Any) -> Any:
        made = []
        for name in names:
            one = _FLAGS[name]()
            if name in defaults:
                one.default, one.show_default = defaults[name], True
            made.append(one)
        # click reads this list from its end, as nested decorators would have filled it.
        function.__click_params__ = [*getattr(function, "__click_params__", []), *reversed(made)]
        return function

    return add


def extra(group: str, *names: str, **rest: Any) -> Decorator:
    """Return a decorator that adds a flag of one verb only.

    Args:
        group: Heading.
        *names: As for ``click.Option``.
        **rest: As for ``click.Option``.

    Returns:
        The decorator.
    """

    def add(function: Any) -> Any:
        one = flag(group, *names, **rest)()
        function.__click_params__ = [*getattr(function, "__click_params__", []), one]
        return function

    return add


def known_keys() -> set[str]:
    """Return the keys that a run's configuration may hold, whichever verb reads it."""
    return {*DATA, *METHOD, *MEASURING, *TRAINING, *RUNNING, "json", "quiet", "plan", "methods"}
