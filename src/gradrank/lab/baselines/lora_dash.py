"""LoRA-Dash: LoRA beside trained changes of singular values along task-specific directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gradrank.adapters.site import LoraSite
from gradrank.adapters.view import lora_sites
from gradrank.core.errors import BudgetError, OptionError
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.driver import StepDriver
from gradrank.lab.baselines.shared_peft import attach
from gradrank.lab.baselines.weights import base_weight, singular_parts
from gradrank.methods.method import option, require

_USUAL = 100


@dataclass(frozen=True, slots=True)
class LoraDash:
    """Uniform LoRA; after some steps its update says which directions of the weight to scale.

    The forward pass is that of ``W + s B A + U_s diag(Δσ) V_sᵀ`` from then on. Δσ starts at 0 and
    counts in the budget; it is in the unit of singular values and has no scale.
    """

    name: ClassVar[str] = "lora-dash"
    summary: ClassVar[str] = "LoRA and trained singular values of task-specific directions"
    source: ClassVar[str] = "Si et al., LoRA-Dash, arXiv 2409.01035, section 4; code: gradrank"
    matched: ClassVar[bool] = True

    directions: int = option(8, "directions s per target, at most min(d_in, d_out) are used")
    prelaunch: int | None = option(
        None, "steps of plain LoRA first; none: 100, or a tenth of a run that is below 1,000 steps"
    )
    epsilon: float = option(1e-6, "added to singular values that are divided by")

    def __post_init__(self) -> None:
        require(self.directions >= 1, self.name, "directions", self.directions, "1 or more")
        legal = self.prelaunch is None or self.prelaunch >= 1
        require(legal, self.name, "prelaunch", self.prelaunch, "1 or more")
        require(0 < self.epsilon < 1, self.name, "epsilon", self.epsilon, "above 0 and below 1")

    def build(self, setting: Setting) -> Built:
        """Return the model to train.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model, with Δσ beside every adapter, and the callback that launches them.

        Raises:
            BudgetError: If the budget does not pay rank 1 and Δσ on every target.
            OptionError: If training ends before the launch.
        """
        launch = self.prelaunch or min(_USUAL, max(1, setting.steps // 10))
        if launch >= setting.steps:
            raise OptionError(
                f"option 'prelaunch' of method '{self.name}' is {launch}, and the run has "
                f"{setting.steps} steps, so that no direction would ever be trained. Lower it."
            )
        counts = {t.name: min(self.directions, t.max_rank) for t in setting.targets}
        aside = sum(counts.values())
        floor = aside + sum(target.cost for target in setting.targets)
        if setting.budget < floor:
            raise BudgetError(
                f"budget {setting.budget:,} is below the floor of {floor:,} parameters: rank 1 and "
                f"{self.directions} singular values on each of {len(counts)} targets. Raise the "
                "budget, or lower directions."
            )
        plan = setting.uniform(setting.budget - aside)
        model = attach(setting, plan)
        dashes = {}
        for name, site in lora_sites(model, "default").items():
            base_weight(site.layer, name, self.name)
            dashes[name] = attach_dash(site, counts[name])
        notes = () if launch == _USUAL else (f"directions are chosen after step {launch}",)
        return Built(model, Launch(dashes, launch, self.epsilon), plan.ranks, notes=notes)


class Dash(nn.Module):
    """Δσ of one target, and the directions that it belongs to.

    The numbers of the directions are a buffer that is saved with the adapter; the directions
    themselves follow from them and the frozen weight.

    Attributes:
        delta_sigma: Δσ ``[s]``, trained.
        chosen: Numbers of the directions ``[s]``, by falling singular value; -1: not chosen yet.
        left: Columns of U ``[d_out, s]``.
        right: Rows of Vᵀ ``[s, d_in]``.
    """

    chosen: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, count: int, like: Tensor) -> None:
        """Make room for some directions.

        Args:
            count: How many, s.
            like: The frozen weight ``[d_out, d_in]``.
        """
        super().__init__()
        d_out, d_in = like.shape
        kind = {"device": like.device, "dtype": torch.float32}
        self.delta_sigma = nn.Parameter(torch.zeros(count, **kind))
        self.register_buffer("chosen", torch.full((count,), -1, device=like.device))
        self.register_buffer("left", torch.zeros(d_out, count, **kind), persistent=False)
        self.register_buffer("right", torch.zeros(count, d_in, **kind), persistent=False)
        self.launched = False

    def launch(self, U: Tensor, Vt: Tensor, chosen: Tensor) -> None:
        """Take up directions; from now on they are part of the forward pass.

        Args:
            U: All left singular vectors, ``[d_out, n]``.
            Vt: All right ones, ``[n, d_in]``.
            chosen: Numbers of those to take, ``[s]``.
        """
        self.chosen.copy_(chosen)
        self.left.copy_(U[:, chosen])
        self.right.copy_(Vt[chosen])
        self.launched = True

    def forward(self, x: Tensor) -> Tensor:
        """Return what the directions add to a layer's output.

        Args:
            x: The layer's input, ``[..., d_in]``.

        Returns:
            ``U_s diag(Δσ) V_sᵀ x``, ``[..., d_out]``.
        """
        along = linear(x.to(self.right.dtype), self.right)
        return linear(along * self.delta_sigma, self.left)


def attach_dash(site: LoraSite, count: int) -> tuple[LoraSite, Dash]:
    """Put Δσ beside an adapter, without effect until it is launched.

    Args:
        site: A plain LoRA layer.
        count: Directions s.

    Returns:
        The layer, and its Δσ.
    """
    layer: Any = site.layer
    dash = Dash(count, base_weight(layer, site.name, LoraDash.name))
    # Named so that PEFT saves and loads it with the adapter, and gradrank counts it.
    layer.lora_dash = nn.ModuleDict({site.adapter: dash})
    layer.register_forward_hook(_Add(site.adapter))
    return site, dash


@dataclass(frozen=True, slots=True)
class _Add:
    """Adds what the directions give to a LoRA layer's output."""

    adapter: str

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dash = layer.lora_dash[self.adapter]
        if not dash.launched or layer.disable_adapters:
            return output
        added = dash(layer.lora_dropout[self.adapter](inputs[0]))
        return output + added.to(output.dtype)


class Launch(StepDriver):
    """Chooses the directions once, from what LoRA has learnt up to then."""

    def __init__(
        self, dashes: Mapping[str, tuple[LoraSite, Dash]], step: int, epsilon: float
    ) -> None:
        """Prepare.

        Args:
            dashes: Layers and their Δσ, by target.
            step: After which step they are launched.
            epsilon: Added to singular values that are divided by.
        """
        self.dashes, self.step, self.epsilon = dict(dashes), step, epsilon

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the directions of a checkpoint that was written after the launch."""
        for site, dash in self.dashes.values():
            if not dash.launched and bool((dash.chosen >= 0).all()):
                U, _, Vt = singular_parts(base_weight(site.layer, site.name, LoraDash.name))
                dash.launch(U, Vt, dash.chosen.clone())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Launch, if it is time; the function stays as it is, since Δσ is 0."""
        if state.global_step == self.step:
            self.launch()

    def launch(self) -> None:
        """Choose the directions of every target."""
        for site, dash in self.dashes.values():
            U, sigma, Vt = singular_parts(base_weight(site.layer, site.name, LoraDash.name))
            A, B = site.raw("A").detach().float(), site.raw("B").detach().float()
            rates = change_rates(U, sigma, Vt, A, site.scaling * B, self.epsilon)
            order = rates.argsort(descending=True, stable=True)
            dash.launch(U, Vt, order[: dash.delta_sigma.numel()])


def change_rates(
    U: Tensor, sigma: Tensor, Vt: Tensor, A: Tensor, B: Tensor, epsilon: float
) -> Tensor:
    """Return how much an update changes a weight along each of its singular directions.

    Args:
        U: Left singular vectors of the weight, ``[d_out, n]``.
        sigma: Its singular values, ``[n]``.
        Vt: Its right singular vectors, ``[n, d_in]``.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``; the update is ``B A``.
        epsilon: Added to the singular values.

    Returns:
        ``|u_iᵀ ΔW v_i| / (σ_i + ε)``, ``[n]``; the update itself is not formed.

    Source:
        LoRA-Dash, arXiv 2409.01035, section 3.1 (coordinates, change rate) and 4.1.
    """
    projected = (U.T @ B) * (A @ Vt.T).T
    return projected.sum(1).abs() / (sigma + epsilon)
