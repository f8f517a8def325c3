"""Prompts with a completion and an answer, and the frame that puts an instruction in words."""

from collections.abc import Callable
from dataclasses import dataclass

from gradrank.core.errors import DataError, OptionError, nearest

SCORINGS = ("generate", "likelihood")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One item of an instruction task.

    Attributes:
        prompt: What the model is given.
        completion: What it is trained to write, without the end token.
        answer: The short answer that counts.
        group: Part of the task that the item belongs to, where results are averaged over parts;
            else empty.
        choices: All allowed answers, where the item is multiple choice; else empty.
    """

    prompt: str
    completion: str
    answer: str
    group: str = ""
    choices: tuple[str, ...] = ()

    def completed(self, choice: str) -> str:
        """Return the completion that gives another answer.

        Args:
            choice: The answer.

        Returns:
            The completion with the answer at its end replaced.

        Raises:
            DataError: If the completion does not end with the answer.
        """
        if not self.completion.endswith(self.answer):
            raise DataError(
                f"the completion {self.completion[-40:]!r} does not end with its answer "
                f"'{self.answer}', so no other answer can stand there."
            )
        return self.completion.removesuffix(self.answer) + choice


# Finds the answer in what a model wrote for a prompt; empty if there is none.
Parse = Callable[[str, Prompt], str]


@dataclass(frozen=True, slots=True)
class Template:
    """How the frame around an instruction is laid out.

    Attributes:
        after: What follows the opening sentence on its line.
        after_with_input: The same where the instruction has an input.
        between: The empty line between sections.
        indent: What each further line begins with.
    """

    after: str = ""
    after_with_input: str = ""
    between: str = ""
    indent: str = ""


_INDENT = " " * 16
_LINT = "  # noqa: E501"
# (training, evaluation). The published programs indent the frame and lay it out differently when
# they train and when they evaluate; "plain" is the frame alone, the same in both.
TEMPLATES: dict[str, tuple[Template, Template]] = {
    "plain": (Template(), Template()),
    "published": (
        Template(after=_LINT, after_with_input=_LINT, between=_INDENT, indent=_INDENT),
        Template(after=" ", indent=_INDENT),
    ),
}


def instruction_prompt(
    instruction: str, context: str = "", template: str = "plain", training: bool = False
) -> str:
    """Put an instruction in the frame that the model answers in.

    Args:
        instruction: What is asked.
        context: Further input; empty if there is none.
        template: A name in :data:`TEMPLATES`. ``published`` repeats the layout of the published
            programs to the letter, their unequal training and evaluation frames included.
        training: Whether the prompt is for training.

    Returns:
        The prompt; a completion follows it directly.

    Raises:
        OptionError: If the template is unknown.

    **Source**: Taori et al., Stanford Alpaca (2023), the frame; Hu et al., LLM-Adapters, EMNLP 2023
    (arXiv:2304.01933), the layouts.
    """
    if template not in TEMPLATES:
        raise OptionError(f"unknown template '{template}'. {nearest(template, TEMPLATES)}")
    layout = TEMPLATES[template][0 if training else 1]
    paired = ", paired with an input that provides further context" if context else ""
    lines = [
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request."
        f"{layout.after_with_input if context else layout.after}",
        "",
    ]
    sections = [("Instruction", instruction), *([("Input", context)] if context else [])]
    for title, text in sections:
        lines += [f"{layout.indent}### {title}:", f"{layout.indent}{text}", layout.between]
    lines += [f"{layout.indent}### Response:", layout.indent]
    return "\n".join(lines)
