"""How much of a vector lies in one singular vector of a matrix, without the matrix' singular vectors.

The Lanczos process from a unit vector u with W Wᵀ gives the orthonormal polynomials p_0, p_1, … of the measure that has
mass (u · u_i)² at each σ_i². At every λ the mass is at most the Christoffel function 1 / Σ p_j(λ)², whatever the number
of steps, and between two Ritz values at most the sum of their masses (Chebyshev, Markov and Stieltjes). Where that is
below a limit everywhere, no singular vector holds so much of u. Between Ritz values that have more together, the
Christoffel function is looked at closely, since a peak there may be narrow.

References: Golub and Meurant, "Matrices, Moments and Quadrature with Applications", 2010; Szegő, "Orthogonal
Polynomials", section 3.41.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = (12, 16, 24, 32, 48, 96, 160)  # Lanczos steps after which is looked
_RATIO = 1.1  # of the distances from a Ritz value of neighbouring points at which the Christoffel function is looked at
_CLOSEST = 1e-9  # of those distances, relative to the gap between two Ritz values
_SLACK = 1.05  # for what lies between two points
_TOLERANCE = 1e-6  # residual of a Ritz vector, relative to the largest eigenvalue


def concentrated(W: Tensor, vectors: Tensor, below: Sequence[float], *, outside: Tensor) -> list[bool] | None:
    """For each column u (d_out, n): whether a left singular vector of W has |cos| of at least its `below` with it.

    `outside` (d_out, m): leading left singular vectors of W, m >= 0, that the columns are orthogonal to. Without their
    long directions a few steps settle it. None where that cannot be told within 160. Raises nothing; W is finite.
    """
    count = vectors.shape[1]
    answers: list[bool | None] = [None] * count
    process = _Lanczos(W, vectors, outside)
    for steps in _STEPS:
        process.run(steps)
        for i in range(count):
            if answers[i] is None:
                answers[i] = process.answer(i, below[i])
        if all(answer is not None for answer in answers):
            break
    return None if None in answers else [bool(answer) for answer in answers]


class _Lanczos:
    """Lanczos processes from several vectors side by side, with full reorthogonalization, outside a subspace."""

    def __init__(self, W: Tensor, vectors: Tensor, outside: Tensor) -> None:
        self._W = W
        self._outside = outside
        longest = torch.linalg.vector_norm(outside[:, :1].mT @ W).double()
        self._null = 1e-10 * float(longest.square())  # eigenvalues of W Wᵀ that are rounding
        self._most_steps = W.shape[0] - outside.shape[1]
        first = (vectors / torch.linalg.vector_norm(vectors, dim=0)).mT
        self._basis = first[:, None]  # (n, steps + 1, d_out)
        self._alpha: list[Tensor] = []
        self._beta: list[Tensor] = []

    def run(self, steps: int) -> None:
        """Go on until there are so many steps, or the space is exhausted for all vectors."""
        done, steps = len(self._alpha), min(steps, self._most_steps)
        room = self._basis.new_empty(self._basis.shape[0], max(steps - done, 0), self._basis.shape[2])
        self._basis = torch.cat([self._basis, room], 1)
        for j in range(done, steps):
            q, basis = self._basis[:, j], self._basis[:, : j + 1]
            image = (q @ self._W) @ self._W.mT
            self._alpha.append((q * image).sum(1).double())
            for _ in range(2):
                image = image - (image @ self._outside) @ self._outside.mT
                image = image - ((basis @ image[..., None]).mT @ basis)[:, 0]
            beta = torch.linalg.vector_norm(image, dim=1)
            self._beta.append(beta.double())
            scaled = image / beta.clamp_min(torch.finfo(beta.dtype).tiny)[:, None]
            self._basis[:, j + 1] = torch.where(beta[:, None] > 0, scaled, 0)

    def answer(self, i: int, below: float) -> bool | None:
        """Whether vector i is concentrated in one singular vector; None: not known yet."""
        steps = len(self._alpha)
        alpha = torch.stack([a[i] for a in self._alpha])
        beta = torch.stack([b[i] for b in self._beta])
        largest = float(torch.linalg.vector_norm(alpha, torch.inf) + 2 * beta[:-1].abs().max()) if steps > 1 else 0.0
        spent = (beta <= max(1e-6 * max(largest, float(alpha.abs().max())), self._null)).nonzero()
        if len(spent):  # an invariant subspace: everything is known
            steps = int(spent[0]) + 1
        T = torch.diag(alpha[:steps]) + torch.diag(beta[: steps - 1], 1) + torch.diag(beta[: steps - 1], -1)
        values, vectors = torch.linalg.eigh(T)
        masses = vectors[0].square()
        if len(spent):
            # what W maps to 0 is no singular vector of it
            real = values > (1e-10 * values[-1].abs()).clamp_min(self._null)
            return bool((masses[real].sqrt() >= below).any())
        if self._most(alpha[:steps], beta[:steps], values, masses, below**2) * _SLACK < below**2:
            return False
        residuals = beta[steps - 1] * vectors[-1].abs()
        found = (residuals <= _TOLERANCE * values[-1].abs()) & (masses.sqrt() >= below)
        return True if bool(found.any()) else None

    def _most(self, alpha: Tensor, beta: Tensor, values: Tensor, masses: Tensor, limit: float) -> float:
        """A bound on the mass at any single point, exact enough to be compared with `limit`."""
        pairs = masses[:-1] + masses[1:]
        suspects = (pairs * _SLACK >= limit).nonzero().flatten().tolist()
        most = float(masses.max())
        for k in suspects:
            low, gap = values[k], values[k + 1] - values[k]
            count = 1 + int(math.log(_CLOSEST) / -math.log(_RATIO))
            part = 0.5 * _RATIO ** -torch.arange(count, dtype=values.dtype, device=values.device)
            points = low + gap * torch.cat([part, 1 - part])
            most = max(most, min(float(pairs[k]), self._christoffel(alpha, beta, points)))
        return most if suspects else max(most, float(pairs.max()) if len(pairs) else 0.0)

    @staticmethod
    def _christoffel(alpha: Tensor, beta: Tensor, points: Tensor) -> float:
        """The largest value of the Christoffel function at points."""
        before, now = torch.zeros_like(points), torch.ones_like(points)
        total = torch.ones_like(points)
        for j in range(len(alpha) - 1):
            previous = beta[j - 1] if j else 0.0
            before, now = now, ((points - alpha[j]) * now - previous * before) / beta[j]
            total = total + now.square()
        return float((1 / total).max())
