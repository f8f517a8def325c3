"""Decide where LoRA capacity goes: gradient-based allocation under an exact parameter budget.

>>> import gradrank as gr
>>> gr.Budget.parse("uniform:8")
Budget(kind='uniform', value=8)

Importing this package loads no torch; names are resolved when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradrank.adapters.edits import Drop as Drop
    from gradrank.adapters.edits import Grow as Grow
    from gradrank.adapters.edits import Partition as Partition
    from gradrank.adapters.edits import Select as Select
    from gradrank.adapters.edits import Shrink as Shrink
    from gradrank.adapters.reserve import settle as settle
    from gradrank.adapters.surgery import EditReport as EditReport
    from gradrank.adapters.surgery import edit as edit
    from gradrank.callback import CapacityCallback as CapacityCallback
    from gradrank.controller import Controller as Controller
    from gradrank.core.budget import Budget as Budget
    from gradrank.core.errors import BudgetError as BudgetError
    from gradrank.core.errors import DataError as DataError
    from gradrank.core.errors import GradrankError as GradrankError
    from gradrank.core.errors import MeasurementError as MeasurementError
    from gradrank.core.errors import OptionError as OptionError
    from gradrank.core.errors import OutputError as OutputError
    from gradrank.core.errors import PlanError as PlanError
    from gradrank.core.errors import SurgeryError as SurgeryError
    from gradrank.core.errors import TargetError as TargetError
    from gradrank.core.partition import NeuronPartition as NeuronPartition
    from gradrank.core.plan import Plan as Plan
    from gradrank.core.planned import PlannedTarget as PlannedTarget
    from gradrank.core.targets import Target as Target
    from gradrank.methods.adalora import AdaLora as AdaLora
    from gradrank.methods.course import DynamicMethod as DynamicMethod
    from gradrank.methods.depth import Depth as Depth
    from gradrank.methods.elalora import ElaLora as ElaLora
    from gradrank.methods.gard import Gard as Gard
    from gradrank.methods.gard_dynamic import DynamicGard as DynamicGard
    from gradrank.methods.gradient_norm import GradientNorm as GradientNorm
    from gradrank.methods.hybrid import Hybrid as Hybrid
    from gradrank.methods.igu import Igu as Igu
    from gradrank.methods.igu_direction import IguDirection as IguDirection
    from gradrank.methods.method import Assessment as Assessment
    from gradrank.methods.method import Method as Method
    from gradrank.methods.permuted import Permuted as Permuted
    from gradrank.methods.pilora import PiLora as PiLora
    from gradrank.methods.random_scores import RandomScores as RandomScores
    from gradrank.methods.registry import METHODS as METHODS
    from gradrank.methods.reversed_order import Reversed as Reversed
    from gradrank.methods.subset import Subset as Subset
    from gradrank.methods.uniform import Uniform as Uniform
    from gradrank.methods.waterfill import Waterfill as Waterfill
    from gradrank.prepare import prepare_trainer as prepare_trainer
    from gradrank.record import RunRecord as RunRecord
    from gradrank.serving.export import ExportReport as ExportReport
    from gradrank.serving.installing import load_adapter as load_adapter
    from gradrank.session import allocate as allocate
    from gradrank.session import apply as apply
    from gradrank.session import export as export
    from gradrank.session import measure as measure
    from gradrank.session import plan as plan
    from gradrank.signals.measure import MeanGradient as MeanGradient
    from gradrank.signals.measure import Spectrum as Spectrum
    from gradrank.signals.measurement import Measurement as Measurement
    from gradrank.start import reserve as reserve

_WHERE = {
    "gradrank.adapters.edits": ("Drop", "Grow", "Partition", "Select", "Shrink"),
    "gradrank.adapters.reserve": ("settle",),
    "gradrank.adapters.surgery": ("EditReport", "edit"),
    "gradrank.callback": ("CapacityCallback",),
    "gradrank.controller": ("Controller",),
    "gradrank.core.budget": ("Budget",),
    "gradrank.core.errors": (
        "BudgetError",
        "DataError",
        "GradrankError",
        "MeasurementError",
        "OptionError",
        "OutputError",
        "PlanError",
        "SurgeryError",
        "TargetError",
    ),
    "gradrank.core.partition": ("NeuronPartition",),
    "gradrank.core.plan": ("Plan",),
    "gradrank.core.planned": ("PlannedTarget",),
    "gradrank.core.targets": ("Target",),
    "gradrank.methods.adalora": ("AdaLora",),
    "gradrank.methods.course": ("DynamicMethod",),
    "gradrank.methods.depth": ("Depth",),
    "gradrank.methods.elalora": ("ElaLora",),
    "gradrank.methods.gard": ("Gard",),
    "gradrank.methods.gard_dynamic": ("DynamicGard",),
    "gradrank.methods.gradient_norm": ("GradientNorm",),
    "gradrank.methods.hybrid": ("Hybrid",),
    "gradrank.methods.igu": ("Igu",),
    "gradrank.methods.igu_direction": ("IguDirection",),
    "gradrank.methods.method": ("Assessment", "Method"),
    "gradrank.methods.permuted": ("Permuted",),
    "gradrank.methods.pilora": ("PiLora",),
    "gradrank.methods.random_scores": ("RandomScores",),
    "gradrank.methods.registry": ("METHODS",),
    "gradrank.methods.reversed_order": ("Reversed",),
    "gradrank.methods.subset": ("Subset",),
    "gradrank.methods.uniform": ("Uniform",),
    "gradrank.methods.waterfill": ("Waterfill",),
    "gradrank.prepare": ("prepare_trainer",),
    "gradrank.record": ("RunRecord",),
    "gradrank.serving.export": ("ExportReport",),
    "gradrank.serving.installing": ("load_adapter",),
    "gradrank.session": ("allocate", "apply", "export", "measure", "plan"),
    "gradrank.signals.measure": ("MeanGradient", "Spectrum"),
    "gradrank.signals.measurement": ("Measurement",),
    "gradrank.start": ("reserve",),
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names}

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_NAMES)]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'gradrank' has no attribute '{name}'")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
