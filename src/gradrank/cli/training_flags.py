"""The flags that say how to train."""

from collections.abc import Callable

import click

from gradrank.cli.verb import Flag, flag, switch

_T = "Training"
_COUNT = click.IntRange(min=1)
_MAYBE = click.IntRange(min=0)

TRAINING_FLAGS: dict[str, Callable[[], Flag]] = {
    "steps": flag(_T, "--steps", metavar="N", type=_COUNT, default=100, help="Optimizer steps."),
    "epochs": flag(
        _T,
        "--epochs",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        help="Passes over the training data instead of --steps; rounded up to whole steps.",
    ),
    "lr": flag(
        _T,
        "--lr",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        default=2e-4,
        help="Peak learning rate of AdamW.",
    ),
    "schedule": flag(
        _T,
        "--schedule",
        type=click.Choice(["linear", "cosine", "constant"]),
        default="linear",
        help="Learning rate after the warm-up: to zero in a line or half a cosine, or constant.",
    ),
    "warmup": flag(
        _T, "--warmup", metavar="N", type=_MAYBE, default=0, help="Steps of rising rate."
    ),
    "weight_decay": flag(
        _T,
        "--weight-decay",
        metavar="X",
        type=click.FloatRange(min=0),
        default=0.0,
        help="Decoupled decay.",
    ),
    "lora_alpha": flag(
        _T,
        "--lora-alpha",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        default=16.0,
        help="Every adapter is scaled by this over the budget's uniform rank, whatever its rank.",
    ),
    "lora_dropout": flag(
        _T,
        "--lora-dropout",
        metavar="P",
        type=click.FloatRange(min=0, max=1, max_open=True),
        default=0.0,
        help="Share of an adapter's inputs that is dropped in training.",
    ),
    "eval_every": flag(
        _T,
        "--eval-every",
        metavar="N",
        type=_MAYBE,
        default=0,
        help="Evaluate every N steps; 0: at the end.",
    ),
    "eval_batches": flag(
        _T,
        "--eval-batches",
        type=_COUNT,
        metavar="N",
        help="Evaluate on so many batches only, drawn from the whole split. Default: all.",
    ),
    "checkpoint_every": flag(
        _T,
        "--checkpoint-every",
        metavar="N",
        type=_MAYBE,
        default=0,
        help="Write a checkpoint every N steps; 0: only when interrupted.",
    ),
    "group_by_length": switch(
        _T,
        "--group-by-length",
        "Make batches of texts of like length, so that little is padding. For --head lm there is "
        "none: documents stand one behind the other in full blocks, and see those before them.",
    ),
    "workers": flag(
        _T,
        "--workers",
        metavar="N",
        type=_MAYBE,
        default=0,
        help="Processes that prepare batches beside training (worth it for pictures; texts are "
        "tokenised once, before training). The result is the same.",
    ),
    "gradient_checkpointing": switch(
        _T, "--gradient-checkpointing", "Recompute activations in training, to save memory."
    ),
}
