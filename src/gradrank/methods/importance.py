"""How important every element of an adapter is, smoothed over the looks at its gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradrank.core.errors import MeasurementError, OptionError
from gradrank.core.targets import Target
from gradrank.ops.many import many
from gradrank.ops.uncertainty import combine, smooth_all_
from gradrank.signals.path import FACTORS, RANK_AXIS
from gradrank.signals.sensitivity import Observation

Key = tuple[str, str]


class ElementImportance:
    r"""Mean and deviation of every element's importance, smoothed over the looks at it.

    ``|w|`` times the gradient, or times its path integral, averaged over ``aggregate`` looks, is
    the score s that :func:`gradrank.ops.uncertainty.smooth_` takes in. The score of a direction
    is that of its λ plus the mean over its column of P plus the mean over its row of Q.

    Source:
        IGU-LoRA, equations 3 and 7 to 11; AdaLoRA, arXiv 2303.10512, equations 7 to 11.
    """

    def __init__(
        self,
        beta1: float,
        beta2: float,
        how: str,
        eps: float,
        in_both: bool = False,
        lam_by_size: bool = False,
        aggregate: int = 1,
        signed: bool = False,
    ) -> None:
        self._beta1, self._beta2, self._how, self._eps = beta1, beta2, how, eps
        self._in_both, self._lam_by_size = in_both, lam_by_size
        self._aggregate, self._signed = aggregate, signed
        # By target and factor.
        self._sums: dict[Key, Tensor] = {}
        self._mean: dict[Key, Tensor] = {}
        self._deviation: dict[Key, Tensor] = {}
        self._count = 0
        self._passes = 0

    @torch.no_grad()
    def take(self, observation: Observation) -> None:
        """Take in one look at the gradients."""
        keys = [(n, f) for n, factors in observation.gradients.items() for f in factors]
        self._count += 1
        self._passes += observation.passes
        if keys:
            sizes = many._foreach_abs([observation.weights[n][f] for n, f in keys])
            terms = many._foreach_mul([observation.gradients[n][f] for n, f in keys], sizes)
            if self._sums:
                many._foreach_add_([self._sums[key] for key in keys], terms)
            else:
                self._sums = dict(zip(keys, terms, strict=True))
        if self._count >= self._aggregate:
            self._flush()

    def _flush(self) -> None:
        keys, scores = list(self._sums), list(self._sums.values())
        if keys:
            many._foreach_div_(scores, float(self._count))
            if not self._signed:
                many._foreach_abs_(scores)
            for key, score in zip(keys, scores, strict=True):
                for store in (self._mean, self._deviation):
                    if key not in store:
                        store[key] = torch.zeros_like(score)
            means = [self._mean[key] for key in keys]
            deviations = [self._deviation[key] for key in keys]
            smooth_all_(means, deviations, scores, self._beta1, self._beta2)
        self._sums, self._count = {}, 0

    def scores(self, targets: Sequence[Target], lam: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a score per direction of every target; refused if nothing was looked at."""
        if not self._mean and self._sums:
            self._flush()
        check_seen(bool(self._mean))
        return {target.name: self._score(lam.get(target.name), target.name) for target in targets}

    def _score(self, lam: Tensor | None, name: str) -> Tensor:
        if lam is None:
            return torch.zeros(0)
        parts = {
            factor: combine(
                self._mean[name, factor],
                self._deviation[name, factor],
                self._how,
                self._eps,
                self._in_both,
            )
            for factor in FACTORS
        }
        first = lam.abs().float() if self._lam_by_size else parts["lam"]
        return first + parts["B"].mean(0) + parts["A"].mean(1)

    def follow(self, keep: Mapping[str, tuple[int, ...]]) -> None:
        """Forget the directions that were taken away."""
        for store in (self._sums, self._mean, self._deviation):
            for name, factor in [key for key in store if key[0] in keep]:
                kept = keep[name]
                if kept:
                    store[name, factor] = select(store[name, factor], factor, kept)
                else:
                    del store[name, factor]

    def widen(self, more: Mapping[str, int]) -> None:
        """Begin to remember new directions, behind those that are known, with nothing."""
        for store in (self._sums, self._mean, self._deviation):
            for name, factor in [key for key in store if more.get(key[0])]:
                tensor, axis = store[name, factor], RANK_AXIS[factor]
                shape = [*tensor.shape]
                shape[axis] = more[name]
                store[name, factor] = torch.cat([tensor, tensor.new_zeros(shape)], axis)

    def facts(self) -> dict[str, float]:
        """Return the scoring passes so far."""
        return {"passes": float(self._passes)}

    def state(self) -> dict[str, Tensor]:
        """Return sums, means and deviations by ``KIND/FACTOR/TARGET``, and the counts."""
        saved = {"counts": torch.tensor([self._count, self._passes])}
        for kind, store in self._stores().items():
            saved |= {f"{kind}/{factor}/{name}": t for (name, factor), t in store.items()}
        return saved

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Raises:
            OptionError: If a mean has no deviation of its shape: the state is damaged.
        """
        for store in self._stores().values():
            store.clear()
        self._count, self._passes = (int(n) for n in state["counts"].tolist())
        for key, tensor in state.items():
            kind, _, rest = key.partition("/")
            factor, _, name = rest.partition("/")
            if kind in self._stores():
                self._stores()[kind][name, factor] = tensor.clone()
        shapes = {key: tensor.shape for key, tensor in self._mean.items()}
        if shapes != {key: tensor.shape for key, tensor in self._deviation.items()}:
            raise OptionError(
                "the saved importance has means without deviations of their shapes; it is damaged. "
                "Resume from another checkpoint."
            )

    def _stores(self) -> dict[str, dict[Key, Tensor]]:
        return {"sum": self._sums, "mean": self._mean, "deviation": self._deviation}


def check_seen(seen: bool) -> None:
    """Refuse to prune by nothing.

    Args:
        seen: Whether any gradient was looked at.

    Raises:
        MeasurementError: If none was.
    """
    if not seen:
        raise MeasurementError(
            "no mini-batch with finite gradients was looked at before the first pruning, so "
            "that there is nothing to prune by. Lower the learning rate, or train in bfloat16 "
            "or float32."
        )


def select(tensor: Tensor, factor: str, kept: tuple[int, ...]) -> Tensor:
    """Return the components of a tensor that stay.

    Args:
        tensor: Laid out like the factor.
        factor: ``A``, ``B`` or ``lam``.
        kept: Indices of the components.
    """
    index = torch.tensor(kept, device=tensor.device, dtype=torch.long)
    return tensor.index_select(RANK_AXIS[factor], index)
