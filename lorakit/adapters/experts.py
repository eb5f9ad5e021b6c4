"""The factors of parameters (`target_parameters`): which parameter each belongs to, and how experts are stacked.

PEFT wraps a module once for each of its parameters that it adapts, in the order in which the module has them, so that
the factors of the first are saved under ``….base_layer``, of the last under the module's own name. For experts stacked
in one parameter, lora_A has experts · rank rows, expert by expert, and lora_B rank · experts columns, rank by rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_INNER = ".base_layer"
# The order in which models of experts have their parameters, which the files do not say.
_ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "w1", "up_proj", "w3"),
    *("down_proj", "down_proj_bias", "w2"),
)
_EXPERT = re.compile(r"(?P<before>.*\bexperts)\.(?:expert_)?(?P<index>\d{1,9})\.(?P<after>.+)")


def parameters_of(paths: Collection[str], raw: Mapping[str, Any], targets: Collection[str]) -> dict[str, str]:
    """The parameters, by name, whose factors are saved under some of `paths`; the others adapt modules.

    A parameter called ``weight`` has its module's name. Where the order of a module's parameters is not known, the
    path is the name. `raw` is the adapter's config, and `targets` are its `target_parameters`.

    Example:
        >>> paths = ["layers.0.mlp.experts", "layers.0.mlp.experts.base_layer", "layers.0.self_attn.q_proj"]
        >>> found = parameters_of(paths, {}, ["experts.down_proj", "experts.gate_up_proj"])
        >>> found["layers.0.mlp.experts"], found["layers.0.mlp.experts.base_layer"]
        ('layers.0.mlp.experts.down_proj', 'layers.0.mlp.experts.gate_up_proj')
    """
    owners: dict[str, list[str]] = {}
    for path in paths if targets else ():
        owners.setdefault(_owner(path), []).append(path)
    found: dict[str, str] = {}
    for owner, wrapped in owners.items():
        leaves = {leaf for target in targets if (leaf := _leaf_in(owner, target, raw)) is not None}
        if not leaves:
            continue
        inner_first = sorted(wrapped, key=len, reverse=True)
        ordered = sorted(leaves, key=_place)
        known = len(ordered) == 1 or all(leaf in _ORDER for leaf in ordered)
        if len(ordered) != len(wrapped) or not known:
            found |= {path: path for path in wrapped}
            continue
        for path, leaf in zip(inner_first, ordered, strict=True):
            found[path] = owner if leaf == "weight" else f"{owner}.{leaf}"
    return found


def nested_paths(saved: Mapping[str, str]) -> dict[str, str]:
    """The paths under which PEFT saves the factors of these parameters when it adapts all of them together.

    `saved` has the path of each in an adapter that may lack others of the same module.
    Raises: KeyError for a parameter beside others of its module whose order is not known.
    """
    owners: dict[str, list[str]] = {}
    for name, path in saved.items():
        owners.setdefault(_owner(path), []).append(name)
    paths = dict(saved)
    for owner, members in owners.items():
        leaves = {name: name.removeprefix(f"{owner}.") for name in members}
        complete = {saved[name] for name in members} == {owner + _INNER * depth for depth in range(len(members))}
        unknown = [name for name, leaf in leaves.items() if leaf not in _ORDER]
        if unknown and complete:
            continue
        if unknown and len(members) > 1:
            raise KeyError(unknown[0])
        last_first = sorted(members, key=lambda name: _place(leaves[name]), reverse=True)
        paths |= {name: owner + _INNER * depth for depth, name in enumerate(last_first)}
    return paths


def target_of(name: str, path: str) -> str:
    """The entry of `target_parameters` for a parameter, by its name and its path."""
    return f"{name}.weight" if name == _owner(path) else name


def unstacked(B: Tensor, A: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """B (experts, d_out, r) and A (experts, r, d_in), of the factors as they are saved.

    Example:
        >>> import torch
        >>> B, A = unstacked(torch.arange(6.0).reshape(1, 6), torch.arange(6.0).reshape(6, 1), experts=3)
        >>> B.tolist(), A[0].tolist()
        ([[[0.0, 3.0]], [[1.0, 4.0]], [[2.0, 5.0]]], [[0.0], [1.0]])
    """
    return B.reshape(B.shape[0], -1, experts).permute(2, 0, 1), A.reshape(experts, -1, A.shape[-1])


def stacked(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `unstacked`: B (d_out, r · experts) and A (experts · r, d_in)."""
    return B.permute(1, 2, 0).flatten(1).contiguous(), A.flatten(0, 1).contiguous()


def group_spectrum(singular_values: Tensor) -> Tensor:
    """√Σ_e σ_ek² (m,) of experts' singular values (experts, m), whose squares are what each unit of rank adds to the
    energy of all of them; a single module's (m,) as they are.
    """
    if singular_values.ndim == 1:
        return singular_values
    peak = singular_values.amax().clamp(min=torch.finfo(singular_values.dtype).tiny)  # squares may overflow
    return torch.linalg.vector_norm(singular_values / peak, dim=0) * peak


def expert_name(parameter_name: str, expert: int) -> str:
    """What reports call one expert of a stack: its index before the parameter.

    Example:
        >>> expert_name("layers.0.mlp.experts.down_proj", 3)
        'layers.0.mlp.experts.3.down_proj'
    """
    owner, _, leaf = parameter_name.rpartition(".")
    return f"{owner}.{expert}.{leaf}" if owner else f"{leaf}.{expert}"


def expert_group(module_name: str) -> tuple[str, int] | None:
    """The group of an expert that is a module of its own, with ``*`` for its index, and the index; None for others.

    Example:
        >>> expert_group("layers.0.block_sparse_moe.experts.3.w1"), expert_group("layers.0.self_attn.q_proj")
        (('layers.0.block_sparse_moe.experts.*.w1', 3), None)
    """
    match = _EXPERT.fullmatch(module_name)
    return None if match is None else (f"{match['before']}.*.{match['after']}", int(match["index"]))


def _place(leaf: str) -> int:
    return _ORDER.index(leaf) if leaf in _ORDER else -1


def _owner(path: str) -> str:
    while path.endswith(_INNER):
        path = path.removesuffix(_INNER)
    return path


def _leaf_in(owner: str, target: str, raw: Mapping[str, Any]) -> str | None:
    """The parameter of `owner` that `target` names; None where it names none of this module's."""
    parent, _, leaf = target.rpartition(".")
    if parent:
        return leaf if owner == parent or owner.endswith(f".{parent}") else None
    modules = raw.get("target_modules")  # a parameter's name alone may be in any module that is no target itself
    if isinstance(modules, list | tuple | set | frozenset):
        taken = any(owner == name or owner.endswith(f".{name}") for name in modules if isinstance(name, str))
        return None if taken else leaf
    return leaf if owner.rpartition(".")[2] == "experts" else None
