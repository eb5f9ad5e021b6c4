"""Makes SPECLORA and FISHERLORA true members of PEFT's ``PeftType``. The only file that touches PEFT's registries.

PEFT has no plug-in hook and its enum is closed. So the members are added to the enum in place, and PEFT's own
``register_peft_method`` does the rest. Each tuner module calls `register_tuner` as its last statement. A hook makes
``import peft`` import those modules, so that the order of imports does not matter.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorakit.errors import RegistrationError

if TYPE_CHECKING:
    from peft.utils.peft_types import PeftType

_OWNED = "_added_by_lorakit"
_HOOKED = "_tuners_follow"
_lock = threading.RLock()


def register_tuner(name: str, config_cls: type, model_cls: type, *, hotswap_keys: Sequence[str]) -> PeftType:
    """Register a PEFT method under its upper-case `name`, or replace lorakit's own earlier registration.

    `hotswap_keys` are the config fields that PEFT's hotswap compares between two adapters of this type.
    Raises: RegistrationError if another package has registered `name`; nothing is changed then.
    """
    from peft import mapping
    from peft.utils import hotswap
    from peft.utils.peft_types import PeftType, register_peft_method

    member_name = name.upper()
    with _lock:
        member = PeftType.__members__.get(member_name)
        known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member_name)
        if (member is not None and not hasattr(member, _OWNED)) or (known is not None and not _is_ours(known)):
            owner = "another package" if known is None else f"{known.__module__}.{known.__qualname__}"
            raise RegistrationError(
                f"PEFT's method name {member_name!r} is already taken by {owner}, so lorakit cannot register its own. "
                f"Import only one of the two packages in this process."
            )
        if known is config_cls and mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(member_name) is model_cls:
            return member
        added = member is None
        if member is None:
            member = _add_member(PeftType, member_name)
        registries = (
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
            mapping.PEFT_TYPE_TO_TUNER_MAPPING,
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        )
        before = [registry.pop(member, None) for registry in registries]
        try:
            register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix="lora_")
        except BaseException:
            for registry, value in zip(registries, before, strict=True):
                registry.pop(member, None)
                if value is not None:
                    registry[member] = value
            if added:
                _remove_member(PeftType, member)
            raise
        hotswap.CONFIG_KEYS_TO_CHECK[member] = list(hotswap_keys)
        exported = vars(sys.modules["lorakit"])
        exported |= {cls.__name__: cls for cls in (config_cls, model_cls) if cls.__name__ in exported}
        return member


def register_when_peft_is_imported(tuner_modules: Sequence[str]) -> None:
    """Import `tuner_modules`, each of which calls `register_tuner`: now, or as soon as PEFT is imported."""
    with _lock:
        others = [finder for finder in sys.meta_path if type(finder).__qualname__ != _PeftFinder.__qualname__]
        sys.meta_path[:] = [_PeftFinder(tuner_modules), *others]
    peft = sys.modules.get("peft")
    if peft is None:
        return
    spec = getattr(peft, "__spec__", None)
    if getattr(spec, "_initializing", False):
        if hasattr(spec, _HOOKED):  # another thread is importing PEFT, and will import the tuners when it is done
            return
        __import__("peft")  # waits for the thread that is importing PEFT
    _import_tuners(tuner_modules)


def _import_tuners(tuner_modules: Sequence[str]) -> None:
    """Import the tuner modules; import them again if PEFT itself has been imported again since.

    `__import__`, unlike `importlib.import_module`, accepts a module that this thread is still importing. That module
    registers itself when it is done.
    """
    peft_types = sys.modules.get("peft.utils.peft_types")
    for name in tuner_modules:
        module = sys.modules.get(name)
        stale = getattr(module, "PeftType", None)
        if stale is not None and peft_types is not None and stale is not peft_types.PeftType:
            for loaded in [key for key in sys.modules if key.startswith("lorakit.tuners")]:
                del sys.modules[loaded]
            for exported in [key for key, value in vars(sys.modules["lorakit"]).items() if _is_ours(value)]:
                delattr(sys.modules["lorakit"], exported)
            break
    for name in tuner_modules:
        try:
            __import__(name)
        except RuntimeError as error:
            # Another thread is importing it and waits for this one. It will register the type itself.
            if type(error).__name__ != "_DeadlockError":
                raise


class _PeftFinder(MetaPathFinder):
    """Finds ``peft`` by the other finders, and imports lorakit's tuners right after it."""

    def __init__(self, tuner_modules: Sequence[str]) -> None:
        self._tuner_modules = tuner_modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        exec_module = loader.exec_module

        def exec_then_register(module: ModuleType) -> None:
            exec_module(module)
            _import_tuners(self._tuner_modules)

        # Set on the instance, so that the loader stays the same otherwise (resources, source).
        loader.exec_module = exec_then_register  # type: ignore[method-assign]
        setattr(spec, _HOOKED, True)
        return spec


def _add_member(enum_cls: Any, name: str) -> Any:
    member = str.__new__(enum_cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_cls
    member._sort_order_ = len(enum_cls.__members__)
    setattr(member, _OWNED, True)
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[name] = member
    enum_cls._member_names_.append(name)
    if hasattr(enum_cls, "_hashable_values_"):
        enum_cls._hashable_values_.append(name)
    type.__setattr__(enum_cls, name, member)
    if enum_cls(name) is not member or member not in list(enum_cls) or enum_cls[name] is not member:
        _remove_member(enum_cls, member)
        raise RegistrationError(
            f"lorakit could not add {name!r} to PEFT's enum: the enum module of this Python differs from those of 3.11 "
            f"to 3.14. Please report this, with your version of Python."
        )
    return member


def _remove_member(enum_cls: Any, member: Any) -> None:
    name = member._name_
    enum_cls._member_map_.pop(name, None)
    enum_cls._value2member_map_.pop(name, None)
    for names in (enum_cls._member_names_, getattr(enum_cls, "_hashable_values_", [])):
        if name in names:
            names.remove(name)
    if name in vars(enum_cls):
        type.__delattr__(enum_cls, name)


def _is_ours(value: object) -> bool:
    return isinstance(value, type) and value.__module__.partition(".")[0] == "lorakit"
