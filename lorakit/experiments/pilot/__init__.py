"""Short runs before a training, that say where a low rank may be enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.experiments.pilot._gradient_subspace import GradientSketch as GradientSketch
    from lorakit.experiments.pilot._gradient_subspace import GradientSubspaces as GradientSubspaces
    from lorakit.experiments.pilot._gradient_subspace import gradient_subspaces as gradient_subspaces
    from lorakit.experiments.pilot._hessian import HessianPair as HessianPair
    from lorakit.experiments.pilot._hessian import HessianSpectrum as HessianSpectrum
    from lorakit.experiments.pilot._hessian import hessian_spectrum as hessian_spectrum
    from lorakit.experiments.pilot._update_spectra import UpdateSpectra as UpdateSpectra
    from lorakit.experiments.pilot._update_spectra import UpdateSpectrum as UpdateSpectrum
    from lorakit.experiments.pilot._update_spectra import update_spectra as update_spectra
else:
    __getattr__, __dir__, __all__ = attach(__name__)
