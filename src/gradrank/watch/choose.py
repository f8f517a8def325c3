"""Which watch belongs to a course."""

from typing import Any

from torch import nn

from gradrank.core.errors import OptionError
from gradrank.core.targets import Target
from gradrank.methods.course import Course, DirectionCourse, NeuronCourse, SpectrumCourse
from gradrank.signals.replay import LossFunction
from gradrank.watch.directions import DirectionWatch
from gradrank.watch.neurons import NeuronWatch
from gradrank.watch.protocol import Watch
from gradrank.watch.spectrum import SpectrumWatch


def watch_for(
    course: Course,
    model: nn.Module,
    optimizer: Any,
    targets: tuple[Target, ...],
    adapter: str,
    seed: int,
    loss_function: LossFunction | None = None,
) -> Watch:
    """Return what looks at gradients for a course.

    Args:
        course: The course.
        model: The PEFT model, as it is trained.
        optimizer: Its optimizer.
        targets: The targets.
        adapter: Name of the adapter.
        seed: Seed of sketches, of points on the path and of new directions.
        loss_function: ``loss_function(model, batch)``, where the model returns no loss.

    Returns:
        The watch.

    Raises:
        OptionError: If the course is of no known kind.
    """
    if isinstance(course, DirectionCourse):
        return DirectionWatch(model, optimizer, course, adapter, seed, loss_function)
    if isinstance(course, NeuronCourse):
        return NeuronWatch(model, optimizer, course, targets, adapter)
    if isinstance(course, SpectrumCourse):
        return SpectrumWatch(model, course, targets, seed)
    raise OptionError(
        f"a {type(course).__name__} is no SpectrumCourse, DirectionCourse or NeuronCourse; see "
        "gradrank.methods.course."
    )
