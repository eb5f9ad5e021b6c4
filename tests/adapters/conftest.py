"""Adapters that PEFT saved."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


class EveryLayer(nn.Module):
    """One layer of every kind that PEFT's LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv1d = nn.Conv1d(6, 8, 3)
        self.conv2d = nn.Conv2d(6, 10, (3, 2))
        self.pointwise = nn.Conv2d(6, 10, 1)
        self.conv3d = nn.Conv3d(4, 6, (1, 2, 3))
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(6, 8), "v_proj": nn.Linear(6, 4)}) for _ in "12")
        self.gpt = Conv1D(12, 6)
        self.head = nn.Linear(6, 3)


@pytest.fixture
def saved(tmp_path, randomize):
    """Makes a model with a randomized adapter, saves it, and returns both."""

    def save(config, base=None, **options):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = randomize(get_peft_model(EveryLayer() if base is None else base, config))
        directory = tmp_path / "adapter"
        model.save_pretrained(directory, **options)
        return model, directory

    return save
