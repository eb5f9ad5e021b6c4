"""Names of tensors in an adapter's file: the module that each belongs to, and the part of it."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Part = Literal["A", "B", "bias", "magnitude", "mask", "E"]

_PREFIX = "base_model.model."
_PARTS: dict[tuple[str, str | None], Part] = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A", None): "A",
    ("lora_embedding_B", None): "B",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
    # AdaLoRA has parameters where LoRA has modules
    ("lora_A", None): "A",
    ("lora_B", None): "B",
    ("lora_E", None): "E",
}
_MASK_MODES = ("hadamard", "hadamard_bottom", "svd", "svd_bottom")  # SpecLoRA's; the tensor is named after its mode
_PARTS |= {("lora_spec", f"weight_{mode}"): "mask" for mode in _MASK_MODES}
_LEAF = f"weight(?:_(?:{'|'.join(_MASK_MODES)}))?|bias"
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_spec|lora_E)"
    rf"(?:\.(?P<adapter>(?!(?:{_LEAF})$)[^.]+))?(?:\.(?P<leaf>{_LEAF}))?",
    re.DOTALL,
)


class Key(NamedTuple):
    """The parts of a tensor's name. `adapter_name` is only in the names of a raw state dict, not of saved adapters."""

    module_name: str
    part: Part
    embedding: bool
    adapter_name: str | None


def without_prefix(name: str) -> str:
    """A tensor's or module's name in the base model, without the prefix of PEFT's wrappers."""
    return name.removeprefix(_PREFIX)


def parse_key(name: str) -> Key | None:
    """The parts of a tensor's name; None if it belongs to no low-rank update."""
    match = _KEY.fullmatch(without_prefix(name))
    if match is None:
        return None
    part = _PARTS.get((match["part"], match["leaf"]))
    if part is None:
        return None
    return Key(match["module"], part, match["part"].startswith("lora_embedding"), match["adapter"])


def module_path(name: str) -> str:
    """The name of PEFT's layer that a tensor of a low-rank update belongs to."""
    key = parse_key(name)
    assert key is not None
    return key.module_name


def tensor_name(module_name: str, part: Part, embedding: bool = False) -> str:
    """The name under which PEFT saves a part of a LoRA."""
    leaf = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
    return f"{_PREFIX}{module_name}.{f'lora_embedding_{part}' if embedding and part in 'AB' else leaf[part]}"


def mask_mode(name: str) -> str:
    """The mode of SpecLoRA's mask that a tensor's name says."""
    return name.rpartition(".")[2].removeprefix("weight_")
