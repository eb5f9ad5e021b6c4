"""Initializations of a LoRA that change the base weights."""

from __future__ import annotations

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base_weights(init: object) -> bool:
    """Whether `init_lora_weights=init` changes the base weights.

    The factors are then an update of the changed weights, not of the original ones.
    """
    return isinstance(init, str) and init.lower().startswith(_CHANGES_BASE)
