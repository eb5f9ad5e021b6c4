"""Remember which children every module of a model has, and put them back after PEFT has replaced some."""

from __future__ import annotations

from torch import nn

from lorakit.tuners import _private

Tree = list[tuple[nn.Module, dict[str, nn.Module | None]]]


def module_tree(model: nn.Module) -> Tree:
    """Every module of `model`, with its children by name."""
    return [(module, dict(_private.children(module))) for module in model.modules()]


def restore(tree: Tree) -> None:
    """Give every module the children that it had when `module_tree` was called."""
    for module, children in tree:
        _private.children(module).clear()
        _private.children(module).update(children)
