"""What trials in other processes call: they can import this module, but not a test's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def squared(x, log=None):
    """x², after a line in `log` for each call."""
    if log is not None:
        with open(log, "a") as lines:
            lines.write(f"{x}\n")
    return {"squared": x * x, "process": os.getpid()}


def unless(x, flag):
    """x², or an error while the file `flag` does not exist."""
    if not Path(flag).exists():
        raise ValueError(f"no {x}")
    return squared(x)


def killed(x, flag, times=1, after=0.0):
    """x², but the first so many calls kill their own process."""
    time.sleep(after)
    for i in range(times):
        try:
            Path(f"{flag}-{i}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    return squared(x)


def slowly(x, seconds):
    time.sleep(seconds)
    return squared(x)


def tiny_model():
    """A two-layer Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, max_position_embeddings=64,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def held_out(model):
    """The losses of four examples."""
    import torch
    from torch.nn import functional as F

    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(7))
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


class KillsWorker:
    """`held_out`, but one call, the first with an adapter of rank 4, kills its process."""

    def __init__(self, flag):
        self.flag = flag

    def __call__(self, model):
        configs = getattr(model, "peft_config", {})
        if any(config.r == 4 for config in configs.values()):
            killed(0, self.flag)
        return held_out(model)
