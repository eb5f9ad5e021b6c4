"""lorakit: adapters, spectral tools and surgery for people who fine-tune with Hugging Face PEFT.

``import lorakit`` makes the adapter types SPECLORA and FISHERLORA known to PEFT, whether PEFT is imported before or
after it. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit import _registration
from lorakit._lazy import attach

if TYPE_CHECKING:
    from lorakit import adapters as adapters
    from lorakit import allocation as allocation
    from lorakit import calibration as calibration
    from lorakit import compress as compress
    from lorakit import cost as cost
    from lorakit import data as data
    from lorakit import demo as demo
    from lorakit import errors as errors
    from lorakit import evaluation as evaluation
    from lorakit import experiments as experiments
    from lorakit import export as export
    from lorakit import fisher as fisher
    from lorakit import fleet as fleet
    from lorakit import lens as lens
    from lorakit import merging as merging
    from lorakit import naming as naming
    from lorakit import serving as serving
    from lorakit import spectral as spectral
    from lorakit import statistics as statistics
    from lorakit import surgery as surgery
    from lorakit import tuners as tuners
    from lorakit._version import __version__ as __version__
    from lorakit.tuners.fisherlora import FisherLoRAConfig as FisherLoRAConfig
    from lorakit.tuners.fisherlora import FisherLoRAModel as FisherLoRAModel
    from lorakit.tuners.speclora import SpecLoRAConfig as SpecLoRAConfig
    from lorakit.tuners.speclora import SpecLoRAModel as SpecLoRAModel
else:
    __getattr__, __dir__, __all__ = attach(__name__)

_registration.register_when_peft_is_imported(("lorakit.tuners.speclora", "lorakit.tuners.fisherlora"))
