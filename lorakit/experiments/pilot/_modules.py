"""The linear modules of a base model that a pilot looks at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorakit._checks import preview
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._preserve import check_no_adapters


def check_in_memory(model: nn.Module) -> None:
    """Raises: UnsupportedModelError if weights are on the meta device: offloaded, or never loaded."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise UnsupportedModelError(
            f"A pilot differentiates through all weights, which must be in memory; {len(absent)} are offloaded or were "
            f"never loaded: {preview(absent)}. Load the model on one device."
        )


def linear_modules(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The named linear modules; without names, all but the output layer.

    Raises: TypeError for what is not a model or for one string; ValueError for names that are no linear modules, or if
    there are none; UnsupportedModelError for a model with adapters, or whose weights are not in memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a model (torch.nn.Module); got {type(model).__name__}.")
    if isinstance(names, str):
        raise TypeError(f"`modules` must be a sequence of module names; got the string {names!r}. Put it in a list.")
    check_no_adapters(model)
    check_in_memory(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if names is None:
        chosen = {name: module for name, module in linear.items() if module is not head}
    else:
        unknown = [name for name in names if name not in linear]
        if unknown:
            raise ValueError(f"`modules` must name linear modules; {preview(unknown)} not among {preview([*linear])}.")
        chosen = {name: linear[name] for name in names}
    if not chosen:
        raise ValueError("`modules` must leave at least one linear module; the model has none, or the list is empty.")
    return chosen
