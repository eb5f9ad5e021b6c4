"""A model's modules and their children as they are at one time, to be put back."""

from __future__ import annotations

from torch import nn

Tree = list[tuple[nn.Module, dict[str, nn.Module | None]]]


def module_tree(model: nn.Module) -> Tree:
    """Every module of `model`, with its children by name."""
    return [(module, dict(module._modules)) for module in model.modules()]


def restore(tree: Tree) -> None:
    """Give every module the children that it had."""
    for module, children in tree:
        module._modules.clear()
        module._modules.update(children)
