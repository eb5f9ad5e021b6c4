"""Spectral surgery: reweight the singular values of a trained adapter by their measured sensitivity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.surgery._edit import SurgeryReport as SurgeryReport
    from lorakit.surgery._policies import POLICIES as POLICIES
    from lorakit.surgery._policies import AbsSelect as AbsSelect
    from lorakit.surgery._policies import DoubleSmooth as DoubleSmooth
    from lorakit.surgery._policies import GradDirection as GradDirection
    from lorakit.surgery._policies import Policy as Policy
    from lorakit.surgery._policies import RandomIndex as RandomIndex
    from lorakit.surgery._policies import RobustZ as RobustZ
    from lorakit.surgery._policies import SmoothAbs as SmoothAbs
    from lorakit.surgery._policies import ZScore as ZScore
    from lorakit.surgery._refine import refine as refine
    from lorakit.surgery._refine_report import RefineCandidate as RefineCandidate
    from lorakit.surgery._refine_report import RefineReport as RefineReport
    from lorakit.surgery._report import EditedRow as EditedRow
    from lorakit.surgery._report import SensitivityReport as SensitivityReport
    from lorakit.surgery._report import SensitivityRow as SensitivityRow
    from lorakit.surgery._restore_report import FrontierPoint as FrontierPoint
    from lorakit.surgery._restore_report import RestoreControl as RestoreControl
    from lorakit.surgery._restore_report import RestoredRow as RestoredRow
    from lorakit.surgery._restore_report import RestoreEdit as RestoreEdit
    from lorakit.surgery._restore_report import RestoreReport as RestoreReport
    from lorakit.surgery._reweight import reweight as reweight
    from lorakit.surgery._select import select_modules as select_modules
    from lorakit.surgery._sensitivity import sensitivity as sensitivity
    from lorakit.surgery._study import study as study
    from lorakit.surgery._study_report import StudiedEdit as StudiedEdit
    from lorakit.surgery._study_report import StudyReport as StudyReport
else:
    __getattr__, __dir__, __all__ = attach(__name__)
