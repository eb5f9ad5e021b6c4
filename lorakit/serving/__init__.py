"""Adapters for programs that are not PEFT: the formats that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.serving._check import ServedModule as ServedModule
    from lorakit.serving._check import ServerCheck as ServerCheck
    from lorakit.serving._check import check as check
    from lorakit.serving._check import check_all as check_all
    from lorakit.serving._formats import FormatModule as FormatModule
    from lorakit.serving._formats import FormatReport as FormatReport
    from lorakit.serving._gguf import GGUFReport as GGUFReport
    from lorakit.serving._gguf import write_gguf as write_gguf
    from lorakit.serving._image_models import write_diffusers as write_diffusers
    from lorakit.serving._image_models import write_kohya as write_kohya
    from lorakit.serving._mlx import write_mlx as write_mlx
    from lorakit.serving._profiles import PROFILES as PROFILES
    from lorakit.serving._profiles import ServerProfile as ServerProfile
    from lorakit.serving._profiles import vllm_max_lora_rank as vllm_max_lora_rank
else:
    __getattr__, __dir__, __all__ = attach(__name__)
