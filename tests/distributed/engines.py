"""Training both tuners under DDP, FSDP1 and FSDP2, torch's own and through accelerate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from checks import CONFIGS, DIRECTORY, adapted, run, tiny_llama, token_ids, trainable
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

STEPS = 2
TOLERANCE = 2e-6  # of float32 sums in another order, against parameters that each tensor moves by 0.002 to 0.1
LEARNING_RATE = 0.3


def train(model: nn.Module, optimizer: Any, backward: Callable[[Tensor], Any], part: slice) -> None:
    """Plain gradient descent on this process's part of each batch of four."""
    model.train()
    ids = token_ids(4 * STEPS)
    for step in range(STEPS):
        batch = ids[4 * step : 4 * step + 4][part]
        optimizer.zero_grad()
        backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
    model.eval()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def own_part() -> slice:
    return slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


@functools.cache
def by_one_process(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The parameters and the logits after training on whole batches."""
    model = adapted(CONFIGS[name]())
    before = trainable(model)
    train(model, sgd(model), lambda loss: loss.backward(), slice(None))
    after = trainable(model)
    for key, value in after.items():
        assert (value - before[key]).abs().max() > 100 * TOLERANCE, f"{key} hardly moved"
    with torch.no_grad():
        return after, model(input_ids=token_ids(3)).logits


def assert_parameters(found: dict[str, Tensor], name: str) -> None:
    expected, _ = by_one_process(name)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert (value - expected[key]).abs().max() <= TOLERANCE, key


def assert_checkpoint(model: PeftModel, state: dict[str, Tensor], name: str, engine: str) -> None:
    """A full state dict, saved as an adapter on rank zero, loads without any engine and gives the same logits."""
    out = DIRECTORY / f"{engine}-{name}"
    if dist.get_rank() == 0:
        model.save_pretrained(out, state_dict=state)
    dist.barrier()
    loaded = PeftModel.from_pretrained(tiny_llama(), out).eval()
    expected, logits = by_one_process(name)
    for key, value in loaded.named_parameters():
        if key in expected:
            assert (value - expected[key]).abs().max() <= TOLERANCE, key
    assert expected.keys() <= {key for key, _ in loaded.named_parameters()}
    with torch.no_grad():
        assert (loaded(input_ids=token_ids(3)).logits - logits).abs().max() <= 1e-5


def ddp(name: str) -> None:
    model = adapted(CONFIGS[name]())
    wrapped = DistributedDataParallel(model)
    train(wrapped, sgd(wrapped), lambda loss: loss.backward(), own_part())
    assert_parameters(trainable(model), name)


def fsdp1(name: str, use_orig_params: bool) -> None:
    model = adapted(CONFIGS[name]())
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    train(model, sgd(model), lambda loss: loss.backward(), own_part())
    assert_checkpoint(model.module, full_state_dict(model), name, f"fsdp1-{use_orig_params}")


def full_state_dict(model: FullyShardedDataParallel) -> dict[str, Tensor]:
    # Not with `offload_to_cpu`, as Accelerator.get_state_dict has it: where all is on the CPU already, torch crashes.
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return model.state_dict()


def fsdp2(name: str) -> None:
    model = adapted(CONFIGS[name]())
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, sgd(model), lambda loss: loss.backward(), own_part())
    assert_parameters({key: value.full_tensor() for key, value in trainable(model).items()}, name)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert_checkpoint(model, state, name, "fsdp2")


def accelerator(plugin: FullyShardedDataParallelPlugin | None = None) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if plugin is not None:
        PartialState(cpu=True)
        pretend_gpus()
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    wanted = DistributedType.MULTI_CPU if plugin is None else DistributedType.FSDP
    assert made.distributed_type == wanted
    return made


def pretend_gpus() -> None:
    """Let accelerate believe that there are GPUs: it refuses FSDP on a CPU, although torch's FSDP runs there."""
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


def accelerate_ddp(name: str) -> None:
    tool = accelerator()
    model = adapted(CONFIGS[name]())
    wrapped, optimizer = tool.prepare(model, sgd(model))
    assert isinstance(wrapped, DistributedDataParallel)
    train(wrapped, optimizer, tool.backward, own_part())
    assert_parameters(trainable(model), name)


def accelerate_fsdp(name: str, version: int) -> None:
    options = {"use_orig_params": True} if version == 1 else {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type="FULL_STATE_DICT", auto_wrap_policy="transformer_based_wrap", **options
    )
    tool = accelerator(plugin)
    model = adapted(CONFIGS[name]())
    if version == 1:
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    wrapped, optimizer = tool.prepare(model, sgd(model))
    train(wrapped, optimizer, tool.backward, own_part())
    state = full_state_dict(wrapped) if version == 1 else tool.get_state_dict(wrapped)
    assert_checkpoint(tool.unwrap_model(wrapped), state, name, f"accelerate-fsdp{version}")


def trainer(name: str) -> None:
    """Trainer on both processes, and its checkpoint, against the same steps on whole batches in one process."""
    ids = token_ids(4)
    whole = adapted(CONFIGS[name]()).train()
    optimizer = sgd(whole)
    for _ in range(STEPS):
        optimizer.zero_grad()
        whole(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    accelerator()  # forget the accelerator of the check before
    arguments = TrainingArguments(
        output_dir=str(DIRECTORY / f"trainer-{name}"),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        save_steps=STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = adapted(CONFIGS[name]())
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    dist.barrier()
    loaded = PeftModel.from_pretrained(tiny_llama(), DIRECTORY / f"trainer-{name}" / f"checkpoint-{STEPS}")
    found, saved = trainable(model), dict(loaded.named_parameters())
    for key, value in trainable(whole).items():
        assert (found[key] - value).abs().max() <= TOLERANCE, key
        assert torch.equal(saved[key], found[key]), key


ENGINES: dict[str, Callable[[str], None]] = {
    "ddp": ddp,
    "fsdp1-orig-params": functools.partial(fsdp1, use_orig_params=True),
    "fsdp1-flat-params": functools.partial(fsdp1, use_orig_params=False),
    "fsdp2": fsdp2,
    "accelerate-ddp": accelerate_ddp,
    "accelerate-fsdp1": functools.partial(accelerate_fsdp, version=1),
    "accelerate-fsdp2": functools.partial(accelerate_fsdp, version=2),
    "trainer": trainer,
}
CHECKS = {f"{engine}-{name}": functools.partial(check, name) for engine, check in ENGINES.items() for name in CONFIGS}

if __name__ == "__main__":
    run(CHECKS)
