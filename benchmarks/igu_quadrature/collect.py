"""What the study measures on a model, piece by piece, each kept in a folder once it is there."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.igu_quadrature.measure import PathSettings, Rig
from benchmarks.igu_quadrature.study import chebyshev_points, gauss_legendre
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradrank.core.files import write_atomic

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StudySize:
    """How much is measured.

    Attributes:
        pool: Mini-batches of the pool.
        nodes: Chebyshev points at which each of them is measured.
        direct: Mini-batches that are measured on a uniform grid too.
        grid: Segments of that grid.
        gauss: Points of the Gauss-Legendre rule that is the reference there, and in float64.
        later_steps: Further training steps before the second checkpoint; 0: there is none.
        later_pool: Mini-batches measured there.
        ablations: Directions that are taken out one at a time.
        held_out: Mini-batches on which the loss is taken then.
        splits: Random splits of the pool into halves.
        repeats: Repetitions of simulated errors, in each of ten blocks.
        looks: The M at which errors are simulated.
        budgets: Numbers of gradients at which estimators are compared.
    """

    pool: int = 20
    nodes: int = 13
    direct: int = 2
    grid: int = 32
    gauss: int = 16
    later_steps: int = 60
    later_pool: int = 5
    ablations: int = 64
    held_out: int = 4
    splits: int = 20
    repeats: int = 20
    looks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    budgets: tuple[int, ...] = (10, 30, 100, 300, 1000)


QUICK = (
    PathSettings("tiny-llama", "tiny-lm", rank=2, steps=12, length=16, every=1),
    StudySize(6, 9, 1, 16, 8, 4, 2, 6, 2, 3, 3, (1, 4, 16), (10, 60)),
)


class Kept:
    """A folder of tensors that were measured before."""

    def __init__(self, folder: Path, settings: PathSettings) -> None:
        """Prepare.

        Args:
            folder: The folder; one below it belongs to these settings.
            settings: What was trained.
        """
        text = json.dumps(asdict(settings), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = Path(folder) / f"{settings.model}-{digest}"

    def get(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors from the folder, or make and keep them.

        Args:
            name: What they are; the file's name.
            make: Makes them.

        Returns:
            The tensors.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            made = {key: tensor.contiguous() for key, tensor in make().items()}
            write_atomic(path, lambda temporary: save_file(made, str(temporary)))
        return load_file(str(path))


class Measured:
    """Everything that is measured for the study; made when first asked for.

    Attributes:
        settings: What is trained.
        size: How much is measured.
        rig: The model, at the first checkpoint unless a method says otherwise.
        nodes: The Chebyshev points.
    """

    def __init__(
        self, settings: PathSettings, size: StudySize, folder: Path, say: Say = lambda _: None
    ) -> None:
        """Train, or take the trained adapter from the folder.

        Args:
            settings: What is trained.
            size: How much is measured.
            folder: Where measurements are kept.
            say: Receives a line for each piece.
        """
        self.settings, self.size, self._say = settings, size, say
        self._kept = Kept(folder, settings)
        self.rig = Rig(settings)
        self.nodes = chebyshev_points(size.nodes)
        self._start = self._kept.get(f"before{size.held_out}", self._held_out_losses)
        self._first = self._kept.get("weights", lambda: self._train(settings.steps, 0))
        self.rig.load(self._first)

    def _train(self, steps: int, start: int) -> dict[str, Tensor]:
        self._say(f"training steps {start} to {start + steps}")
        losses = self.rig.train(steps, start)
        return self.rig.weights() | {"losses": torch.tensor(losses)}

    def _held_out_losses(self) -> dict[str, Tensor]:
        return {"losses": self.rig.losses_without({}, self.rig.held_out(self.size.held_out))}

    def losses(self) -> dict[str, Any]:
        """Return held-out losses before and after training, and those of training."""
        size = self.size.held_out
        after = self._kept.get(f"after{size}", self._held_out_losses)
        return {
            "before": float(self._start["losses"].mean()),
            "after": float(after["losses"].mean()),
            "training": self._first["losses"].tolist(),
            "size of λ": float(self.rig.flat_weights()[1].abs().mean()),
        }

    def at_nodes(self, index: int) -> dict[str, Tensor]:
        """Return one mini-batch of the pool at the nodes; see :meth:`Rig.gradients_at`.

        Args:
            index: Which.
        """

        def make() -> dict[str, Tensor]:
            self._say(f"mini-batch {index + 1} at {len(self.nodes)} points")
            return self.rig.gradients_at(self.rig.pool(index + 1)[index], self.nodes)

        return self._kept.get(f"nodes{self.size.nodes}-{index}", make)

    def direct(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return one mini-batch on the uniform grid, and at the points of the reference rule.

        Args:
            index: Which of the pool.
        """
        grid = [k / self.size.grid for k in range(self.size.grid + 1)]
        batch = self.rig.pool(index + 1)[index]

        def measure(points: list[float]) -> dict[str, Tensor]:
            self._say(f"mini-batch {index + 1} at {len(points)} points")
            return self.rig.gradients_at(batch, points)

        fine = list(gauss_legendre(self.size.gauss).points)
        first = self._kept.get(f"grid{self.size.grid}-{index}", lambda: measure(grid))
        second = self._kept.get(f"gauss{self.size.gauss}-{index}", lambda: measure(fine))
        return first, second

    def in_float64(self) -> dict[str, Tensor]:
        """Return the first mini-batch at the points of the reference rule, in float64."""
        points = gauss_legendre(self.size.gauss).points

        def make() -> dict[str, Tensor]:
            self._say(f"mini-batch 1 at {len(points)} points in float64")
            double = Rig(self.settings, "float64")
            double.load(self._first)
            return double.gradients_at(double.pool(1)[0], points)

        return self._kept.get(f"float64-{self.size.gauss}", make)

    def ablated(self) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
        """Return directions, and the held-out losses without each (``[directions, batches]``).

        ``whole`` ``[batches]`` are the losses with all of them.
        """
        generator = torch.Generator().manual_seed(self.settings.seed)
        targets = self.rig.layout.targets
        order = torch.randperm(len(targets), generator=generator).tolist()
        chosen = []
        for number in range(self.size.ablations):
            target = targets[order[number % len(order)]]
            rank = self.rig.layout.ranks[target.name]
            chosen.append((target.name, int(torch.randint(rank, (1,), generator=generator))))

        def make() -> dict[str, Tensor]:
            self._say(f"taking out {len(chosen)} directions, one at a time")
            held = self.rig.held_out(self.size.held_out)
            losses = [self.rig.losses_without({name: [i]}, held) for name, i in chosen]
            return {"losses": torch.stack(losses), "whole": self.rig.losses_without({}, held)}

        return chosen, self._kept.get(f"ablated{self.size.ablations}", make)

    def pruned(self, name: str, removed: Mapping[str, list[int]]) -> dict[str, float]:
        """Return the held-out loss without some directions.

        Args:
            name: What gives them up, for the line that is said.
            removed: Directions by target.

        Returns:
            The mean ``loss``, its rise ``above`` that with all directions, and the standard
            ``error`` of the rise over held-out mini-batches.
        """
        text = json.dumps({key: sorted(found) for key, found in sorted(removed.items())})
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]

        def make() -> dict[str, Tensor]:
            self._say(f"loss without the directions that {name} gives up")
            held = self.rig.held_out(self.size.held_out)
            return {"losses": self.rig.losses_without(removed, held)}

        losses = self._kept.get(f"pruned-{digest}", make)["losses"]
        held = self.size.held_out
        above = losses - self._kept.get(f"after{held}", self._held_out_losses)["losses"]
        error = float(above.std()) / len(above) ** 0.5
        return {"loss": float(losses.mean()), "above": float(above.mean()), "error": error}

    def later(self) -> Iterator[dict[str, Tensor]]:
        """Yield mini-batches at the nodes after more training; the first checkpoint comes back."""
        if not self.size.later_steps:
            return
        steps = self.settings.steps
        weights = self._kept.get(
            f"weights+{self.size.later_steps}", lambda: self._train(self.size.later_steps, steps)
        )
        self.rig.load(weights)
        try:
            for index in range(self.size.later_pool):

                def make(index: int = index) -> dict[str, Tensor]:
                    self._say(f"later checkpoint: mini-batch {index + 1}")
                    batch = self.rig.pool(index + 1)[index]
                    flat, lam = self.rig.flat_weights()
                    found = self.rig.gradients_at(batch, self.nodes)
                    return found | {"flat_weights": flat, "lam_weights": lam}

                name = f"later{self.size.later_steps}-{self.size.nodes}-{index}"
                yield self._kept.get(name, make)
        finally:
            self.rig.load(self._first)
