"""Lengths that were given in epochs, as steps, once the size of the data is known."""

from dataclasses import replace

from gradrank.cli.settings import Settings
from gradrank.lab.epochs import options_in_steps, steps_in


def in_steps(settings: Settings, examples: int) -> Settings:
    """Return settings whose lengths are all in steps.

    Args:
        settings: What was asked for.
        examples: Training examples.

    Returns:
        Settings without epochs, neither of the run nor in options of the method.
    """
    size = settings.batch_size * settings.accumulate
    options = options_in_steps(settings.options or {}, examples, size)
    if settings.epochs is None:
        return replace(settings, options=options)
    steps = steps_in(settings.epochs, examples, size)
    return replace(settings, options=options, steps=steps, epochs=None)


def rehearsed(settings: Settings) -> Settings:
    """Return settings by which a method's options can be checked before the data are read.

    Args:
        settings: What was asked for.

    Returns:
        The same, an epoch taken as one step.
    """
    return in_steps(settings, 1)
