"""The largest eigenvalues of a loss's Hessian, by Lanczos on Hessian-vector products.

The Hessian is that of the mean loss over batches, with respect to an adapter's trainable factors or to one module's
weight. It is never formed: each product is a second backward pass over all batches.

Reference: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994; ARPACK's implicitly
restarted Lanczos method (`scipy.sparse.linalg.eigsh`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit._checks import check_integer, check_number, check_seed
from lorakit._format import share
from lorakit._report import Report
from lorakit.adapters.in_model import find_adapter
from lorakit.calibration.state import check_can_differentiate, no_inference_mode, preserved_rng, preserved_state
from lorakit.errors import CalibrationError
from lorakit.experiments.pilot._batches import PilotLoss, batch_loss, check_finite, pilot_batches
from lorakit.experiments.pilot._modules import check_in_memory, linear_modules

MAX_NUMBERS = 5_000_000  # Lanczos keeps some 20 vectors of this length in float64


@dataclass(frozen=True)
class HessianPair:
    """An eigenvalue, the residual ‖Hv − λv‖ of its unit eigenvector v, and v's share (gᵀv)² / ‖g‖² of the gradient.

    `gradient_share` is None if the gradient is 0.
    """

    eigenvalue: float
    residual: float
    gradient_share: float | None


@dataclass(frozen=True, repr=False)
class HessianSpectrum(Report):
    """The result of `hessian_spectrum`: the `pairs` of the largest eigenvalues, descending, and the smallest pair.

    `of` is "adapter" or the module's name. `smoothness` and `strong_convexity` are L and μ of quadratic bounds on the
    loss, local estimates at the present weights: the largest absolute eigenvalue, and the smallest eigenvalue, None if
    that is not positive. They are about changes of ΔW only if `of` is a module; an adapter's are about its factors.
    """

    of: str
    num_numbers: int
    num_batches: int
    products: int
    gradient_norm: float
    pairs: tuple[HessianPair, ...]
    smallest: HessianPair

    @property
    def smoothness(self) -> float:
        return max(abs(self.pairs[0].eigenvalue), abs(self.smallest.eigenvalue))

    @property
    def strong_convexity(self) -> float | None:
        return self.smallest.eigenvalue if self.smallest.eigenvalue > self.smallest.residual else None

    @property
    def headline(self) -> str:
        held = [pair.gradient_share for pair in self.pairs if pair.gradient_share is not None]
        largest, smallest = self.pairs[0].eigenvalue, self.smallest.eigenvalue
        ending = f"; the {len(held)} largest hold {share(sum(held))} of the gradient's energy" if held else ""
        return f"{self.of}: Hessian eigenvalues from {smallest:.3g} to {largest:.3g}{ending}"

    def rows(self) -> list[dict[str, Any]]:
        """One row an eigenpair, the smallest last."""
        return [vars(pair) for pair in (*self.pairs, self.smallest)]


def hessian_spectrum(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int,
    k: int = 5,
    module: str | None = None,
    adapter_name: str | None = None,
    loss_fn: PilotLoss | None = None,
    tol: float = 1e-3,
    seed: int = 0,
) -> HessianSpectrum:
    """The `k` largest eigenpairs and the smallest one of the loss's Hessian, and the gradient's share in them.

    The model is in eval mode, and afterwards as it was. Attention runs in its plain implementation, since fused ones
    have no second derivative. The batches are kept in memory.

    Args:
        model: with `module`, a base model; without, a model with adapters.
        loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes.
        num_batches: how many batches of `loader` are used, at most.
        k: how many of the largest eigenvalues.
        module: the name of a linear module, whose weight the Hessian is about.
        adapter_name: which adapter's factors it is about, if not the active one.
        loss_fn: ``loss_fn(model, batch)`` returns the loss of a batch; the model's own unless given.
        tol: relative accuracy of the eigenvalues at which Lanczos stops.
        seed: of the starting vector.

    Raises: ValueError for arguments that are not allowed, and for more than 5 million numbers; CalibrationError for an
    empty loader, losses or gradients that are not finite, and if Lanczos does not converge; UnsupportedModelError for
    a model without adapters, or with `module` for one that has some.
    """
    check_integer("k", k)
    check_number("tol", tol, above=0.0)
    check_seed("seed", seed)
    if module is not None and adapter_name is not None:
        raise ValueError("`adapter_name` must not be given with `module`: the Hessian is of one or the other.")
    check_can_differentiate(model)
    parameters = _parameters(model, module, adapter_name)
    n = sum(parameter.numel() for parameter in parameters)
    of = "adapter" if module is None else module
    if n > MAX_NUMBERS:
        raise ValueError(
            f"The Hessian of {of!r} is of {n} numbers; at most {MAX_NUMBERS}. Choose one smaller `module`."
        )
    if k >= n:
        raise ValueError(f"`k` must be less than the {n} numbers of {of!r}; got {k}.")
    with (
        no_inference_mode(),
        preserved_state(model),
        preserved_rng(model),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):
        if adapter_name is not None and isinstance(model, PeftModel):
            model.set_adapter(adapter_name)
        model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        batches = list(pilot_batches(model, loader, num_batches))
        hessian = _Hessian(model, parameters, batches, loss_fn)
        gradient = hessian.gradient()
        largest = _pairs(hessian, gradient, n, k, "LA", tol, seed)
        (smallest,) = _pairs(hessian, gradient, n, 1, "SA", tol, seed)
    norm = float(np.linalg.norm(gradient))
    return HessianSpectrum(of, n, len(batches), hessian.products, norm, tuple(largest), smallest)


def _parameters(model: nn.Module, module: str | None, adapter_name: str | None) -> list[nn.Parameter]:
    if module is not None:
        return [cast(nn.Parameter, linear.weight) for linear in linear_modules(model, [module]).values()]
    _, modules = find_adapter(model, adapter_name)
    check_in_memory(model)
    factors = (p for one in modules for part in (one.down, one.up) for p in part.parameters())
    return list(dict.fromkeys(factors))


class _Hessian:
    """Products of the mean loss's Hessian with vectors, in the parameters' dtype."""

    def __init__(
        self, model: nn.Module, parameters: list[nn.Parameter], batches: list[Any], loss_fn: PilotLoss | None
    ) -> None:
        self.model, self.parameters, self.batches, self.loss_fn = model, parameters, batches, loss_fn
        self.products = 0

    def gradient(self) -> NDArray[np.float64]:
        return self._mean(None)

    def times(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        self.products += 1
        pieces = torch.split(torch.from_numpy(np.ravel(vector)), [parameter.numel() for parameter in self.parameters])
        return self._mean([v.view(p.shape).to(p.device, p.dtype) for v, p in zip(pieces, self.parameters, strict=True)])

    def _mean(self, vector: list[Tensor] | None) -> NDArray[np.float64]:
        total: list[Tensor] | None = None
        for batch in self.batches:
            loss = batch_loss(self.model, batch, self.loss_fn)
            grads = torch.autograd.grad(
                loss, self.parameters, create_graph=vector is not None, allow_unused=True, materialize_grads=True
            )
            if vector is not None:
                slope = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)]).sum()
                if slope.requires_grad:
                    grads = torch.autograd.grad(slope, self.parameters, allow_unused=True, materialize_grads=True)
                else:  # the loss is linear
                    grads = tuple(torch.zeros_like(g) for g in grads)
            parts = [g.detach().double() / len(self.batches) for g in grads]
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
        flat = torch.cat([part.flatten() for part in total or []])
        check_finite(flat, "The loss's gradient or Hessian")
        return cast(NDArray[np.float64], flat.cpu().numpy())


def _pairs(
    hessian: _Hessian, gradient: NDArray[np.float64], n: int, k: int, which: str, tol: float, seed: int
) -> list[HessianPair]:
    """Eigenpairs, the largest eigenvalue first.

    Raises: CalibrationError if Lanczos does not converge.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    operator = LinearOperator((n, n), matvec=hessian.times, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(n)
    try:
        values, vectors = eigsh(operator, k=k, which=which, tol=tol, v0=start)
    except ArpackError as error:
        raise CalibrationError(
            f"Lanczos did not find {k} eigenpairs of the Hessian: {error}. Raise `tol` or lower `k`."
        ) from error
    square, pairs = float(gradient @ gradient), []
    for i in np.argsort(-values):
        vector = vectors[:, i]
        residual = float(np.linalg.norm(hessian.times(vector) - values[i] * vector))
        part = float(gradient @ vector) ** 2 / square if square else None
        pairs.append(HessianPair(float(values[i]), residual, part))
    return pairs
