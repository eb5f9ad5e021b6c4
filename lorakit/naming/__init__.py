"""What module names mean: roles, layers, rank patterns and default targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.naming.patterns import alpha_of as alpha_of
    from lorakit.naming.patterns import compact_pattern as compact_pattern
    from lorakit.naming.patterns import lookup as lookup
    from lorakit.naming.patterns import targeted_modules as targeted_modules
    from lorakit.naming.patterns import targeted_parameters as targeted_parameters
    from lorakit.naming.patterns import unmatched_keys as unmatched_keys
    from lorakit.naming.roles import ROLES as ROLES
    from lorakit.naming.roles import Role as Role
    from lorakit.naming.roles import layer_of as layer_of
    from lorakit.naming.roles import layer_prefix as layer_prefix
    from lorakit.naming.roles import role_of as role_of
    from lorakit.naming.targets import default_targets as default_targets
else:
    __getattr__, __dir__, __all__ = attach(__name__)
