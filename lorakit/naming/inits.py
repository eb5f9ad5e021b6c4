"""LoRA initializations that change the base weights (PiSSA, OLoRA, …)."""

from __future__ import annotations

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base_weights(init: object) -> bool:
    """Whether `init_lora_weights=init` changes the base weights.

    The factors then update the changed weights, not the original ones.

    Example:
        >>> changes_base_weights("pissa_niter_4"), changes_base_weights("gaussian"), changes_base_weights(True)
        (True, False, False)
    """
    return isinstance(init, str) and init.lower().startswith(_CHANGES_BASE)
