"""Spectral surgery: reweight the singular values of a trained adapter by what a little data says of them."""

from lorakit.surgery._policies import (
    POLICIES,
    AbsSelect,
    DoubleSmooth,
    GradDirection,
    Policy,
    RandomIndex,
    RobustZ,
    SmoothAbs,
    ZScore,
)
from lorakit.surgery._reports import EditedRow, SensitivityReport, SensitivityRow
from lorakit.surgery._reweight import SurgeryReport, reweight
from lorakit.surgery._sensitivity import select_modules, sensitivity

__all__ = [
    "POLICIES",
    "AbsSelect",
    "DoubleSmooth",
    "EditedRow",
    "GradDirection",
    "Policy",
    "RandomIndex",
    "RobustZ",
    "SensitivityReport",
    "SensitivityRow",
    "SmoothAbs",
    "SurgeryReport",
    "ZScore",
    "reweight",
    "select_modules",
    "sensitivity",
]
