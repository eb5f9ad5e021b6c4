"""Batched linear algebra of low-rank updates, from their factors: no models, no files, no device names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.spectral.lowrank import SVD as SVD
    from lorakit.spectral.lowrank import LowRank as LowRank
    from lorakit.spectral.metrics import ScalingLaw as ScalingLaw
    from lorakit.spectral.metrics import adapter_parameters as adapter_parameters
    from lorakit.spectral.metrics import capacity_utilization as capacity_utilization
    from lorakit.spectral.metrics import dominance as dominance
    from lorakit.spectral.metrics import effective_rank as effective_rank
    from lorakit.spectral.metrics import energy_curve as energy_curve
    from lorakit.spectral.metrics import energy_rank as energy_rank
    from lorakit.spectral.metrics import fit_scaling_law as fit_scaling_law
    from lorakit.spectral.metrics import forward_multiply_adds as forward_multiply_adds
    from lorakit.spectral.metrics import full_parameters as full_parameters
    from lorakit.spectral.metrics import imbalance_ratio as imbalance_ratio
    from lorakit.spectral.metrics import knee as knee
    from lorakit.spectral.metrics import loss_gap_bound as loss_gap_bound
    from lorakit.spectral.metrics import parameter_ratio as parameter_ratio
    from lorakit.spectral.metrics import pearson as pearson
    from lorakit.spectral.metrics import spectral_entropy as spectral_entropy
    from lorakit.spectral.metrics import spectral_truncation_error as spectral_truncation_error
    from lorakit.spectral.metrics import stable_rank as stable_rank
    from lorakit.spectral.metrics import truncation_error as truncation_error
    from lorakit.spectral.metrics import utilization as utilization
    from lorakit.spectral.subspace import gradient_overlap as gradient_overlap
    from lorakit.spectral.subspace import leading_similarity as leading_similarity
    from lorakit.spectral.subspace import principal_angles as principal_angles
    from lorakit.spectral.subspace import principal_cosines as principal_cosines
    from lorakit.spectral.subspace import random_subspace_overlap as random_subspace_overlap
    from lorakit.spectral.subspace import random_update_cosine as random_update_cosine
    from lorakit.spectral.subspace import residual_ratio as residual_ratio
    from lorakit.spectral.subspace import subspace_overlap as subspace_overlap
    from lorakit.spectral.subspace import topk_overlap as topk_overlap
    from lorakit.spectral.subspace import update_cosine as update_cosine
    from lorakit.spectral.threshold import hard_threshold_coefficient as hard_threshold_coefficient
    from lorakit.spectral.threshold import hard_threshold_rank as hard_threshold_rank
else:
    __getattr__, __dir__, __all__ = attach(__name__)
