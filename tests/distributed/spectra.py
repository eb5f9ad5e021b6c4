"""Snapshots, watched gradients and SpectralCallback under DDP and FSDP2, against one process with the whole batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from checks import CONFIGS, DIRECTORY, adapted, run, token_ids
from engines import STEPS, accelerator, own_part, pretend_gpus
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from lorakit import lens
from lorakit.errors import CalibrationError
from lorakit.lens import Snapshot, SpectralCallback, Trajectory


def given_basis(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same orthonormal U and V of each module in every process; three columns, one less than the rank."""
    generator = torch.Generator().manual_seed(8)
    layers = ((name, layer) for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer))
    return {
        name: tuple(
            torch.linalg.qr(torch.randn(d, 3, generator=generator)).Q for d in (layer.out_features, layer.in_features)
        )
        for name, layer in layers
    }


def alone(name: str, *, given: bool = False) -> Snapshot:
    """The gradients of the whole batch in one process, by plain hooks, without the process group."""
    model = adapted(CONFIGS[name]())
    basis = given_basis(model)
    reference = lens.snapshot(model)
    found = []
    for row in reference.modules:
        layer = model.get_base_model().get_submodule(row.module_name)
        ids = token_ids(4)
        seen = []
        handle = layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        loss = model(input_ids=ids, labels=ids).loss
        handle.remove()
        [(x, output)] = seen
        (delta,) = torch.autograd.grad(loss, [output])
        G = torch.einsum("nto,nti->oi", delta.double(), x.double())
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        U, _, Vh = torch.linalg.svd(update.detach().double(), full_matrices=False)
        U, V = U[:, : row.rank], Vh[: row.rank].mT
        if given:
            U, V = (part.double() for part in basis[row.module_name])
        seen_norm = float((U.mT @ G @ V).norm())
        found.append(dataclasses.replace(row, gradient_norm=float(G.norm()), kappa=seen_norm / float(G.norm())))
    return dataclasses.replace(reference, modules=tuple(found))


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    assert len(found.modules) == len(expected.modules) > 0
    for row, other in zip(found.modules, expected.modules, strict=True):
        for field in ("effective_rank", "stable_rank", "frobenius_norm", "spectral_norm"):
            assert math.isclose(getattr(row, field), getattr(other, field), rel_tol=1e-5), (row.module_name, field)
        assert math.isclose(row.kappa, other.kappa, rel_tol=0.06), (row.module_name, row.kappa, other.kappa)


def watched(model: nn.Module, passes: Callable[[], Any], basis: Any = None) -> lens.GradientWatch:
    with lens.watch_gradients(model, projections=8192, basis=basis) as gradients:
        passes()
    return gradients


def backward(model: nn.Module) -> None:
    ids = token_ids(4)[own_part()]
    model(input_ids=ids, labels=ids).loss.backward()


def ddp(name: str, *, given: bool = False) -> None:
    model = adapted(CONFIGS[name]())
    basis = given_basis(model) if given else None
    model = DistributedDataParallel(model)
    gradients = watched(model, lambda: backward(model), basis)
    if dist.get_rank() == 0:  # without the others
        assert_same(lens.snapshot(model, gradients=gradients), alone(name, given=given))


def fsdp2_basis(name: str) -> None:
    model = adapted(CONFIGS[name]())
    basis = given_basis(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert_same(lens.snapshot(model, gradients=watched(model, lambda: backward(model), basis)), alone(name, given=True))


def fsdp2(name: str, *, checkpointing: bool = False) -> None:
    model = adapted(CONFIGS[name]())
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    gradients = watched(model, lambda: backward(model))
    with CommDebugMode() as exchanged:
        found = lens.snapshot(model, gradients=gradients)
    assert_same(found, alone(name))
    # B is shared out by its rows: the r × r sums of each shape are added up. A by its r rows: it is gathered itself.
    counts = {str(operation): count for operation, count in exchanged.get_comm_counts().items()}
    gathered = sum(count for operation, count in counts.items() if "gather" in operation)
    reduced = sum(count for operation, count in counts.items() if "reduce" in operation)
    assert gathered == len(found.modules), counts
    assert 0 < reduced <= len(found.modules), counts


def fsdp2_leaves(name: str) -> None:
    """Factors that fully_shard shards by themselves are gathered only in their own forward."""
    model = adapted(CONFIGS[name]())
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factor in (layer.lora_A, layer.lora_B):
                fully_shard(factor["default"])
    fully_shard(model)
    gradients = watched(model, lambda: backward(model))
    assert_same(lens.snapshot(model, gradients=gradients), alone(name))


def fsdp1_is_refused(name: str) -> None:
    model = FullyShardedDataParallel(adapted(CONFIGS[name]()), use_orig_params=True, device_id=torch.device("cpu"))
    for call in (lambda: lens.snapshot(model), lambda: watched(model, lambda: None)):
        try:
            call()
        except CalibrationError as error:
            assert "fully_shard (FSDP2)" in str(error)  # noqa: PT017
        else:
            raise AssertionError("not refused")


def train(name: str, where: str, size: int, *, shards: bool = False) -> SpectralCallback:
    ids = token_ids(4)
    callback = SpectralCallback(every=1, projections=4096)
    accelerator()  # forget the accelerator of the check before
    arguments = TrainingArguments(
        output_dir=str(DIRECTORY / where),
        per_device_train_batch_size=size,
        max_steps=STEPS,
        learning_rate=0.1,
        optim="sgd",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        fsdp=shards,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]} if shards else None,
    )
    if shards:
        assert arguments.device.type == "cpu"  # made here: what accelerate is told about GPUs would be made anew
        pretend_gpus()
    model = adapted(CONFIGS[name]())
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows)
    callback.attach(trainer)
    trainer.train()
    assert isinstance(model, FSDPModule) == shards
    return callback


def trainer(name: str, *, shards: bool = False) -> None:
    """Only the first process writes, and if nothing is sharded only it measures; κ is that of the whole batch."""
    where = f"spectra-{name}-{shards}"
    callback = train(name, where, 2, shards=shards)
    dist.barrier()
    if dist.get_rank() != 0:
        assert shards or callback.trajectory.snapshots == ()
        return
    found = Trajectory.read(DIRECTORY / where / "spectra.jsonl")
    assert [one.step for one in found.snapshots] == list(range(STEPS + 1))
    assert found == callback.trajectory
    assert_same(found.snapshots[1], dataclasses.replace(found.snapshots[1], modules=_with_kappas(found, name)))


def _with_kappas(found: Trajectory, name: str) -> Any:
    """The first step's gradient is of the adapter as it was at step 0."""
    kappas = {row.module_name: row.kappa for row in alone(name).modules}
    return tuple(dataclasses.replace(row, kappa=kappas[row.module_name]) for row in found.snapshots[1].modules)


def callback_fsdp2(name: str) -> None:
    """The events of a Trainer on a sharded model: all processes take part in measuring, only the first writes."""
    model = adapted(CONFIGS[name]())
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    first = dist.get_rank() == 0
    path = DIRECTORY / f"callback-fsdp2-{name}.jsonl"
    callback = SpectralCallback(every=2, projections=8192, path=path)
    state = TrainerState(max_steps=3, is_world_process_zero=first)
    arguments, control = TrainingArguments(output_dir=str(DIRECTORY), use_cpu=True, report_to=[]), TrainerControl()
    event = functools.partial(_event, callback, arguments, state, control, model)
    event("on_train_begin")
    for step in (1, 2):
        event("on_step_begin")
        backward(model)
        event("on_pre_optimizer_step")
        state.global_step = step
        event("on_step_end")
    event("on_train_end")
    dist.barrier()
    found = Trajectory.read(path)
    assert [one.step for one in found.snapshots] == [0, 2]
    assert_same(found.snapshots[-1], alone(name))
    assert bool(state.log_history) == first


def _event(callback: Any, arguments: Any, state: Any, control: Any, model: Any, name: str) -> None:
    getattr(callback, name)(arguments, state, control, model=model)


ENGINES: dict[str, Callable[[str], None]] = {
    "ddp": ddp,
    "ddp-basis": functools.partial(ddp, given=True),
    "fsdp2-basis": fsdp2_basis,
    "fsdp2": fsdp2,
    "fsdp2-checkpointing": functools.partial(fsdp2, checkpointing=True),
    "fsdp2-leaves": fsdp2_leaves,
    "fsdp1-is-refused": fsdp1_is_refused,
    "callback-fsdp2": callback_fsdp2,
    "trainer": trainer,
    "trainer-fsdp2": functools.partial(trainer, shards=True),
}
CHECKS = {
    f"{engine}-{name}": functools.partial(check, name)
    for engine, check in ENGINES.items()
    for name in ("hadamard", "fisherlora")
}

if __name__ == "__main__":
    run(CHECKS)
