"""Adapters for programs that are not PEFT: the formats that they read."""

from lorakit.serving._gguf import GGUFReport, write_gguf

__all__ = ["GGUFReport", "write_gguf"]
