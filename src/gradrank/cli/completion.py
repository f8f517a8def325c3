"""``gradrank completion``: what makes a shell complete verbs, flags and names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from gradrank.cli.options import COMMON, flags
from gradrank.cli.verb import Verb
from gradrank.lab.baselines.registry import PATHS
from gradrank.methods.registry import METHODS

VARIABLE = "_GRADRANK_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """\
gradrank completion bash >> ~/.bashrc
gradrank completion zsh >> ~/.zshrc
gradrank completion fish > ~/.config/fish/completions/gradrank.fish"""

# Names as text: their registries load PyTorch and transformers, and a key press must not wait for
# that. A test compares them with the registries.
MODELS = (
    "smollm2-135m", "minilm-l6", "dinov2-small-focus", "tiny-llama", "tiny-gpt2", "tiny-bert",
    "tiny-vit",
)  # fmt: skip
TASKS = (
    "movie-review-lm", "movie-review-sentiment", "tiny-lm", "tiny-sentiment", "tiny-images",
    "wikitext2", "cola", "sst2", "mrpc", "qqp", "mnli", "mnli-mm", "qnli", "rte", "boolq", "piqa",
    "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa", "commonsense-170k", "gsm8k",
    "cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn", "cifar10",
)  # fmt: skip
BUDGETS = ("uniform:1", "uniform:2", "uniform:4", "uniform:8", "uniform:16", "0.1%", "0.5%")
TARGETS = ("all-linear", "q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj")
DEVICES = ("auto", "cpu", "cuda")

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
@flags(*COMMON)
def command(shell: str, as_json: bool, quiet: bool) -> None:
    """Print the script that makes SHELL complete verbs, flags, methods, tasks and models.

    Append it to the shell's start-up file, as below, and open a new terminal.
    """
    from gradrank.cli.console import Console

    text = script(shell)
    console = Console(as_json, quiet)
    console.show(text)
    console.result({"shell": shell, "script": text})


def script(shell: str) -> str:
    """Return the completion script of a shell, which is click's own.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.

    Returns:
        The script.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    maker = kind(click.Group(), {}, "gradrank", VARIABLE)
    # Not maker.source(), which for bash starts a bash to ask for its version.
    return maker.source_template % maker.source_vars()


def teach(command: click.Command) -> None:
    """Let the flags of a verb complete the names that they take.

    Args:
        command: The verb.
    """
    for parameter in command.params:
        if str(parameter.name) in _NAMES and not isinstance(parameter.type, click.Choice):
            parameter._custom_shell_complete = _NAMES[str(parameter.name)]


def _from(names: Iterable[str]) -> Complete:
    known = list(names)

    def complete(_context: click.Context, _what: click.Parameter, text: str) -> list[Any]:
        return [CompletionItem(name) for name in known if name.startswith(text)]

    return complete


def _list_of(names: Iterable[str]) -> Complete:
    """Complete the last of several names with commas between."""
    known = list(names)

    def complete(_context: click.Context, _what: click.Parameter, text: str) -> list[Any]:
        before, comma, last = text.rpartition(",")
        taken = before.split(",")
        left = [name for name in known if name.startswith(last) and name not in taken]
        return [CompletionItem(f"{before}{comma}{name}") for name in left]

    return complete


def _names_or_files(names: Iterable[str]) -> Complete:
    known = _from(names)

    def complete(context: click.Context, what: click.Parameter, text: str) -> list[Any]:
        return known(context, what, text) or [CompletionItem(text, type="file")]

    return complete


def _presets(context: click.Context, what: click.Parameter, text: str) -> list[Any]:
    from gradrank.presets import presets

    return _from(presets())(context, what, text)


_NAMES: Mapping[str, Complete] = {
    "method": _from(METHODS),
    "methods": _list_of(METHODS),
    "name": _from([*METHODS, *PATHS]),
    "model": _names_or_files(MODELS),
    "task": _from(TASKS),
    "budget": _from(BUDGETS),
    "targets": _from(TARGETS),
    "device": _from(DEVICES),
    "preset": _presets,
}
