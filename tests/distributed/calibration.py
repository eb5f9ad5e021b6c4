"""Sensitivity and surgery on two processes, against one process with the whole loader."""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from checks import CONFIGS, adapted, run
from engines import accelerator, sgd
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lorakit._distributed._private import parameter_groups, resharding
from lorakit.calibration import run as calibration_run
from lorakit.calibration.run import collect
from lorakit.errors import CalibrationError, SurgeryError
from lorakit.fisher import probe
from lorakit.surgery import SensitivityReport, SurgeryReport, reweight, sensitivity

TOLERANCE = 1e-5
UNLABELLED = 2


class Examples(torch.utils.data.Dataset):
    """Examples of different lengths; one has no labels, and reading the one at `broken` fails."""

    def __init__(self, n: int, broken: int = -1) -> None:
        generator = torch.Generator().manual_seed(4)
        self.ids = [torch.randint(1, 64, (3 + i % 5,), generator=generator) for i in range(n)]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == self.broken:
            raise OSError(f"example {i} cannot be read")
        return self.ids[i], torch.full_like(self.ids[i], -100) if i == UNLABELLED else self.ids[i]


class Stream(IterableDataset):
    """The same examples, without a length."""

    def __init__(self, n: int) -> None:
        self.examples = Examples(n)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.examples.__getitem__, range(len(self.examples)))


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    batch = {key: torch.full((len(examples), 8), fill) for key, fill in (("input_ids", 0), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(len(examples), 8, dtype=torch.long)
    for row, (ids, labels) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = labels
        batch["attention_mask"][row, : len(ids)] = 1
    return batch


def plain(n: int, batch_size: int, **options: Any) -> DataLoader:
    return DataLoader(options.pop("dataset", None) or Examples(n), batch_size, collate_fn=collate, **options)


def sampled(n: int, batch_size: int, *, drop_last: bool = False, **options: Any) -> DataLoader:
    dataset = Examples(n, **options)
    return plain(
        n, batch_size, dataset=dataset, sampler=DistributedSampler(dataset, shuffle=False, drop_last=drop_last)
    )


def prepared(n: int, batch_size: int, *, stream: bool = False, broken: int = -1, **options: Any) -> Any:
    dataset = Stream(n) if stream else Examples(n, broken)
    own = {"num_processes": dist.get_world_size(), "process_index": dist.get_rank()}
    options = own | {"device": torch.device("cpu"), "put_on_device": True} | options
    return prepare_data_loader(plain(n, batch_size, dataset=dataset), **options)


LOADERS: dict[str, Callable[[int, int], Any]] = {
    "sampler": sampled,
    "shard": prepared,
    "shard-split": functools.partial(prepared, split_batches=True),
    "shard-uneven": functools.partial(prepared, even_batches=False),
    "dispatcher": functools.partial(prepared, dispatch_batches=True),
    "dispatcher-stream": functools.partial(prepared, dispatch_batches=True, stream=True),
}


def model(std: float = 0.3, config: Any = None) -> PeftModel:
    return adapted(config or LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"), std)


def assert_alike(report: SensitivityReport, expected: SensitivityReport) -> None:
    """Equal to what one process found, and bit for bit the same in all processes."""
    assert (report.num_examples, report.num_without_labels) == (expected.num_examples, expected.num_without_labels)
    assert [row.module_name for row in report.modules] == [row.module_name for row in expected.modules]
    for row, wanted in zip(report.modules, expected.modules, strict=True):
        assert row.per_example.shape == wanted.per_example.shape
        assert (row.per_example - wanted.per_example).abs().max() <= TOLERANCE * wanted.per_example.abs().max()
        assert row.sensitivity == pytest.approx(wanted.sensitivity, rel=TOLERANCE)
    bits: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(bits, (report.to_dict(), [row.per_example.tolist() for row in report.modules]))
    assert all(other == bits[0] for other in bits)


def every_loader(kind: str) -> None:
    """Sizes with and without a remainder, smaller than a round of batches, and a limit below the size."""
    adapter = model()
    for n, batch_size, limit in [(7, 2, 128), (8, 2, 128), (9, 4, 128), (3, 2, 128), (1, 2, 128), (12, 2, 5)]:
        expected = sensitivity(adapter, plain(n, 3), num_examples=limit, progress=False)
        loader = LOADERS[kind](n, batch_size)
        assert_alike(sensitivity(adapter, loader, num_examples=limit, progress=False), expected)
    assert_alike(  # the loader can be used again
        sensitivity(adapter, loader, progress=False), sensitivity(adapter, plain(12, 3), progress=False)
    )


def no_repeats() -> None:
    """A sampler that drops the last examples: only whole rounds count."""
    adapter = model()
    expected = sensitivity(adapter, plain(6, 3), progress=False)
    assert_alike(sensitivity(adapter, sampled(7, 2, drop_last=True), progress=False), expected)


def nothing_for_one() -> None:
    """A process without a batch, and a process without a label."""
    adapter = model()
    expected = sensitivity(adapter, plain(2, 2), progress=False)
    assert_alike(sensitivity(adapter, prepared(2, 2, even_batches=False), progress=False), expected)
    expected = sensitivity(adapter, plain(3, 3), progress=False)
    assert_alike(sensitivity(adapter, prepared(3, 2), progress=False), expected)


def one_at_a_time() -> None:
    """A model whose examples cannot be told apart runs one example at a time in each process."""

    class Inseparable:
        """A probe that sees an example's loss only if it is alone in its batch."""

        def begin(self, *, one_example: bool) -> None:
            self.one_example = one_example

        def collect(self, num_examples: int) -> Tensor | None:
            return seen[-1].reshape(1, 1) if self.one_example else None

    seen: list[Tensor] = []
    adapter = model()

    def loss_fn(adapter: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        losses = adapter(input_ids=ids).logits[:, 0].logsumexp(-1) + ids.sum(1)
        seen.append(losses.detach()[-1])
        return losses.requires_grad_() if not losses.requires_grad else losses

    expected = collect(adapter, plain(7, 1), [Inseparable()], num_examples=6, loss_fn=loss_fn, progress=False)
    found = collect(adapter, prepared(7, 2), [Inseparable()], num_examples=6, loss_fn=loss_fn, progress=False)
    assert found.num_examples == expected.num_examples == 6
    torch.testing.assert_close(found.statistics, expected.statistics, rtol=TOLERANCE, atol=0)


def by_one_process(config: Any = None, **options: Any) -> tuple[SurgeryReport, dict[str, Tensor]]:
    adapter = model(config=config)
    report = reweight(adapter, plain(7, 3), progress=False, **options)
    return report, {key: value.detach().clone() for key, value in adapter.named_parameters() if "lora_" in key}


def assert_reweighted(adapter: nn.Module, report: SurgeryReport, **options: Any) -> None:
    expected, factors = by_one_process(**options)
    assert_alike(report, expected)
    for row, wanted in zip(report.modules, expected.modules, strict=True):
        assert row.edited_singular_values == pytest.approx(wanted.edited_singular_values, rel=TOLERANCE)
    found = {key: value for key, value in adapter.named_parameters() if "lora_" in key}
    assert found.keys() == factors.keys()
    for key, value in found.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        assert (value - factors[key]).abs().max() <= TOLERANCE, key
        bits = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(bits, value.detach().contiguous())
        assert all(torch.equal(other, bits[0]) for other in bits), key


def surgery_under_ddp(policy: str) -> None:
    for loader in (sampled(7, 2), prepared(7, 2), plain(7, 2)):
        adapter = model()
        wrapped = DistributedDataParallel(adapter)
        before = {key: value.detach().clone() for key, value in adapter.named_parameters()}
        report = reweight(wrapped, loader, policy=policy, progress=False)
        if loader.__class__ is DataLoader and isinstance(loader.sampler, torch.utils.data.SequentialSampler):
            object.__setattr__(report, "edit_id", "each its own")
        assert_reweighted(adapter, report, policy=policy)
        report.undo()
        for key, value in adapter.named_parameters():
            assert torch.equal(value, before[key])


def surgery_by_accelerate() -> None:
    tool = Accelerator(cpu=True)
    adapter, loader = tool.prepare(model(), plain(7, 2))
    assert isinstance(adapter, DistributedDataParallel)
    report = reweight(adapter, loader, progress=False)
    assert_reweighted(tool.unwrap_model(adapter), report)


def sharded(config: Any = None) -> PeftModel:
    adapter = model(config=config)
    for layer in adapter.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(adapter)
    return adapter


def state(adapter: nn.Module) -> dict[str, Any]:
    """What a pass must restore of a sharded model: its parts, their flags, and how they are resharded."""
    found: dict[str, Any] = {
        key: (value.to_local().detach().clone(), value.requires_grad, value.grad is None)
        for key, value in adapter.named_parameters()
    }
    for name, module in adapter.named_modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups(module):
                after_forward, after_backward = resharding(group)
                found[f"{name}:"] = (after_forward is None, after_backward)
    return found


def assert_same_state(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for key, value in now.items():
        if isinstance(value[0], Tensor):
            assert torch.equal(value[0], before[key][0]), key
            assert value[1:] == before[key][1:], key
        else:
            assert value == before[key], key


def surgery_under_fsdp2(tuner: str) -> None:
    config = CONFIGS[tuner]
    options = {"target_modules": "all-linear"}
    for warm in (False, True):
        adapter = sharded(config())
        if warm:  # a model that has been run before
            adapter(**collate([Examples(3)[0]])).loss.backward()
            adapter.zero_grad()
        before = state(adapter)
        report = reweight(adapter, prepared(7, 2), progress=False, **options)
        assert all(isinstance(value, DTensor) for value in adapter.parameters())
        assert_reweighted(adapter, report, config=config(), **options)
        report.undo()
        if warm:
            assert_same_state(state(adapter), before)
        adapter.train()
        adapter(**collate([Examples(3)[0]])).loss.backward()  # and it can still be trained
        assert all(value.grad is not None for value in adapter.parameters() if value.requires_grad)


def surgery_under_accelerate_s_fsdp2() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    tool = accelerator(plugin)
    adapter = model()
    adapter, _, loader = tool.prepare(adapter, sgd(adapter), plain(7, 2))
    assert all(isinstance(value, DTensor) for value in adapter.parameters())
    report = reweight(adapter, loader, progress=False)
    assert_reweighted(adapter, report)


def refuses(loader: Any, adapter: Any, *parts: str, **options: Any) -> None:
    """All processes raise CalibrationError, with the same message."""
    with pytest.raises(CalibrationError) as error:
        reweight(adapter, loader, progress=False, **options)
    for part in parts:
        assert part in str(error.value), str(error.value)
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, str(error.value))
    assert said[0] == said[1]


def a_failing_process() -> None:
    """An example that only one process reads cannot be read; a loss function fails in one process."""
    for adapter in (model(), sharded()):
        before = {key: value.detach().clone() for key, value in adapter.named_parameters()}
        refuses(prepared(8, 2, broken=6), adapter, "process 1 raised OSError", "example 6 cannot be read")
        refuses(sampled(8, 2, broken=4), adapter, "process 0 raised OSError")

        def fails(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            logits = model(input_ids=batch["input_ids"]).logits
            if dist.get_rank() == 1:
                raise RuntimeError("out of luck")
            return logits[:, 0].logsumexp(-1)

        for loader in (prepared(8, 2), prepared(8, 2, dispatch_batches=True)):
            refuses(loader, adapter, "process 1 raised RuntimeError: out of luck", loss_fn=fails)
        for key, value in adapter.named_parameters():
            now = value.full_tensor() if isinstance(value, DTensor) else value
            was = before[key].full_tensor() if isinstance(value, DTensor) else before[key]
            assert torch.equal(now, was), key
        assert any(value.requires_grad for value in adapter.parameters())
        assert isinstance(reweight(adapter, prepared(8, 2), progress=False), SurgeryReport)  # and it can be done again


def a_loader_that_no_process_can_use() -> None:
    adapter = model()
    refuses(prepared(0, 2, even_batches=False), adapter, "no batch")
    unlabelled = Examples(3)
    unlabelled.ids = unlabelled.ids[:1] * 3
    unlabelled.__class__ = type(
        "Unlabelled", (Examples,), {"__getitem__": lambda self, i: Examples.__getitem__(self, 2)}
    )
    loader = prepare_data_loader(
        plain(3, 1, dataset=unlabelled), num_processes=dist.get_world_size(), process_index=dist.get_rank()
    )
    refuses(loader, adapter, "None of the 3 examples")


class Unlabelled(IterableDataset):
    """Examples without end and without labels."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(Examples(3)[UNLABELLED])


def endless_loaders() -> None:
    """All processes stop together once enough examples had no label."""
    loaders = [
        prepare_data_loader(
            DataLoader(Unlabelled(), 2, collate_fn=collate),
            num_processes=dist.get_world_size(),
            process_index=dist.get_rank(),
            dispatch_batches=True,
            put_on_device=True,
            device=torch.device("cpu"),
        ),
        DataLoader(Unlabelled(), 2, collate_fn=collate),
    ]
    with mock.patch.object(calibration_run, "MAX_WITHOUT_LABELS", 40):
        for loader in loaders:
            refuses(loader, model(), "None of the 40 examples looked at has a label")


def saving_a_sharded_adapter() -> None:
    edit = reweight(sharded(), prepared(7, 2), progress=False)
    with pytest.raises(SurgeryError, match="Save it from a full state dict"):
        edit.save("nowhere")
    assert not Path("nowhere").exists()


def unclear_loaders() -> None:
    class Backwards(DistributedSampler):
        def __iter__(self) -> Iterator[int]:
            return iter(list(super().__iter__())[::-1])

    class Own(BatchSampler):
        pass

    adapter, dataset = model(), Examples(8)
    sampler = DistributedSampler(dataset)
    half = DistributedSampler(dataset, num_replicas=4, rank=dist.get_rank())
    batches = Own(sampler, 2, False)
    ranks = {"num_processes": 2, "process_index": dist.get_rank()}
    loaders: list[Iterable[Any]] = [
        plain(8, 2, dataset=dataset, sampler=Backwards(dataset)),
        plain(8, 2, dataset=dataset, sampler=half),
        DataLoader(dataset, batch_sampler=batches, collate_fn=collate),
        prepare_data_loader(DataLoader(dataset, batch_sampler=Own(range(8), 2, False), collate_fn=collate), **ranks),
        prepare_data_loader(plain(8, 2, dataset=dataset, sampler=sampler), **ranks),
        prepare_data_loader(plain(8, 2), num_processes=4, process_index=dist.get_rank()),
        prepared(8, 2, stream=True, dispatch_batches=False),
        skip_first_batches(prepared(8, 2), 1),
    ]
    for loader in loaders:
        refuses(loader, adapter, "which part is unclear")
    twice = plain(8, 2, dataset=dataset, sampler=DistributedSampler(dataset, shuffle=False))
    twice.collate_fn = lambda examples: collate(examples * 2)
    refuses(twice, adapter, "should have 2 examples")


def fsdp1() -> None:
    sharded = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    refuses(plain(7, 2), sharded, "FSDP1", "full state dict")


def one_process_alone() -> None:
    """With a loader that is not sharded a process does not wait for others."""
    if dist.get_rank() == 0:
        report = sensitivity(model(), plain(7, 2), progress=False)
        assert report.num_examples == 6


def the_fisher_probe(engine: str) -> None:
    """An adapter and, if it is not sharded, a base model."""
    everyone = [(model(), sharded() if engine == "fsdp2" else DistributedDataParallel(model()))]
    if engine == "ddp":
        everyone.append((model().unload(), DistributedDataParallel(model().unload().requires_grad_(True))))
    for one, wrapped in everyone:
        expected = probe(one, plain(7, 3), target_modules=["q_proj", "v_proj"], factors=["weight"], progress=False)
        loader = prepared(7, 2)
        report = probe(wrapped, loader, target_modules=["q_proj", "v_proj"], factors=["weight"], progress=False)
        assert (report.num_examples, report.num_without_labels) == (expected.num_examples, expected.num_without_labels)
        for row, wanted in zip(report.modules, expected.modules, strict=True):
            assert row.module_name == wanted.module_name
            assert row.fisher == pytest.approx(wanted.fisher, rel=1e-5)
            assert row.stderr == pytest.approx(wanted.stderr, rel=1e-5)
            assert row.weight.value == pytest.approx(wanted.weight.value, rel=1e-5)


CHECKS: dict[str, Callable[[], None]] = {
    **{f"loader-{kind}": functools.partial(every_loader, kind) for kind in LOADERS},
    "no-repeats": no_repeats,
    "nothing-for-one": nothing_for_one,
    "one-at-a-time": one_at_a_time,
    **{f"ddp-{policy}": functools.partial(surgery_under_ddp, policy) for policy in ("smooth_abs", "grad_direction")},
    "accelerate": surgery_by_accelerate,
    **{f"fsdp2-{tuner}": functools.partial(surgery_under_fsdp2, tuner) for tuner in CONFIGS},
    "fsdp2-accelerate": surgery_under_accelerate_s_fsdp2,
    **{f"fisher-{engine}": functools.partial(the_fisher_probe, engine) for engine in ("ddp", "fsdp2")},
    "fsdp2-save": saving_a_sharded_adapter,
    "failing-process": a_failing_process,
    "endless": endless_loaders,
    "no-data": a_loader_that_no_process_can_use,
    "unclear-loaders": unclear_loaders,
    "fsdp1": fsdp1,
    "one-process-alone": one_process_alone,
}

if __name__ == "__main__":
    PartialState(
        cpu=True, timeout=datetime.timedelta(seconds=60)
    )  # that of a dispatching loader, which an Accelerator would have made
    run(CHECKS)
