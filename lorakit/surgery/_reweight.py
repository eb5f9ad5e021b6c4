"""The edit itself: decompose, measure, reweight, write back; whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from lorakit._distributed.fsdp import unwrapped
from lorakit._distributed.shards import from_first
from lorakit._version import __version__
from lorakit.adapters.in_model import LiveModule, read_weight, write_weight
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import preserved_rng
from lorakit.errors import SurgeryError
from lorakit.spectral import LowRank
from lorakit.surgery._policies import ENERGIES, Aggregate, Policy, preserve, resolve_policy
from lorakit.surgery._record import add_record, remove_record
from lorakit.surgery._report import EditedRow, SensitivityReport
from lorakit.surgery._sensitivity import Decomposed, aggregate_examples, check_aggregate, measure


@dataclass(frozen=True)
class _Backup:
    """A module's factors before and after an edit, (B, A)."""

    module: LiveModule
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SurgeryReport(SensitivityReport):
    """What an edit found and did; it can be undone for as long as the edited factors are as it left them."""

    modules: list[EditedRow]  # type: ignore[assignment]
    edit_id: str
    policy: str
    policy_parameters: dict[str, Any]
    preserve_energy: str
    seed: int
    lorakit_version: str
    _backups: list[_Backup] = field(repr=False, compare=False, metadata={"in_memory": True})
    _adapter: PeftModel = field(repr=False, compare=False, metadata={"in_memory": True})

    def undo(self) -> None:
        """Give the edited modules the factors they had before, bit for bit.

        Raises: SurgeryError, and changes nothing, where the factors are no longer those that the edit wrote: they were
        trained on, edited again, loaded anew, or this edit is undone already.
        """
        for backup in self._backups:
            layer = backup.module.layer
            if self.adapter_name not in layer.lora_A:
                raise SurgeryError(f"Adapter {self.adapter_name!r} is no longer in {backup.module.name!r}.")
            if layer.merged:
                raise SurgeryError(
                    f"{layer.merged_adapters} are merged into {backup.module.name!r}; call unmerge_adapter() first, or "
                    f"unmerging would take another update out of the weight than was merged into it."
                )
            if not all(map(_same, _factors(backup.module), backup.after)):
                raise SurgeryError(
                    f"The factors of {backup.module.name!r} are no longer those that this edit wrote, so it cannot be "
                    f"undone: undo later edits first; what was trained or loaded since would be lost."
                )
        _exchange(self._backups, undo=True, then=lambda: remove_record(self._adapter, self.adapter_name, self))


def reweight(
    adapter: PeftModel,
    calib_loader: Iterable[Any],
    *,
    policy: str | Policy = "smooth_abs",
    target_modules: str | Sequence[str] | None = None,
    aggregate: Aggregate | None = None,
    preserve_energy: Literal["l1", "l2", "none"] | None = "l1",
    num_examples: int = 128,
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SurgeryReport:
    """Reweight the singular values of a trained adapter's update by their sensitivities, in place.

    Each selected module's ΔW = U diag(σ) Vh keeps U and Vh; the policy maps σ and the sensitivities g to σ′, which is
    clamped at 0, rescaled to σ's sum (`preserve_energy` "l1"), 2-norm ("l2") or not at all ("none"), and written back
    in the stored rank, dtype and key names as B′ = U √(σ′/scaling), A′ = √(σ′/scaling) Vh: still a plain LoRA.
    An adapter saved after an edit has the edit's record, ``lorakit_surgery.json``, beside it.

    Args:
        adapter, calib_loader, target_modules, num_examples, loss_fn, adapter_name, progress: see `sensitivity`.
        policy: a name (abs_select, smooth_abs, random_index, grad_direction, double_smooth, z_score, robust_z) or a
            policy object, for instance ``AbsSelect(core_frac=0.3)``.
        aggregate: None is what the policy needs: ``mean`` (signed) for grad_direction, ``mean_abs`` for the rest.
        seed: for policies that draw at random.

    Returns: a report, with `undo()`.
    Raises: as `sensitivity`, and for an unknown policy or one whose result is unusable. Whatever is raised, by the
    loader, the model, a policy or Ctrl-C, leaves the model as it was.
    Reference: Tian et al., "Spectral Surgery", 2026, section 3.
    """
    chosen = resolve_policy(policy)
    aggregate = chosen.aggregate if aggregate is None else aggregate
    check_aggregate(aggregate)
    energy = "none" if preserve_energy is None else preserve_energy
    if energy not in ENERGIES:
        raise ValueError(f"`preserve_energy` must be one of {', '.join(ENERGIES)}; got {preserve_energy!r}.")
    generator = torch.Generator().manual_seed(int(seed))
    adapter = unwrapped(adapter)
    measured = measure(
        adapter,
        calib_loader,
        target_modules=target_modules,
        num_examples=num_examples,
        loss_fn=loss_fn,
        adapter_name=adapter_name,
        progress=progress,
    )
    edit_id = from_first(uuid.uuid4().hex, calib_loader)
    plan = [
        (item, per_example, aggregate_examples(per_example, aggregate))
        for item, per_example in zip(measured.modules, measured.per_example, strict=True)
    ]
    with preserved_rng(adapter):  # a policy may draw elsewhere than from its generator
        rows, backups = [], []
        for item, per_example, g in plan:
            sigma = item.S.detach().to("cpu", torch.float64)
            proposed = _checked(chosen(sigma.clone(), g.clone(), generator=generator), sigma, item.module.name)
            edited = preserve(proposed, sigma, energy)
            rows.append(_row(item, sigma, g, proposed.clamp(min=0), edited, per_example))
            before = _factors(item.module)
            backups.append(_Backup(item.module, before, _new_factors(item, edited, sigma, before)))
        report = SurgeryReport(
            adapter_name=measured.adapter_name,
            aggregate=aggregate,
            num_examples=measured.collected.num_examples,
            num_without_labels=measured.collected.num_without_labels,
            zero_modules=measured.zero_modules,
            idle_modules=measured.idle_modules,
            modules=rows,
            edit_id=edit_id,
            policy=policy if isinstance(policy, str) else type(chosen).__name__,
            policy_parameters=_parameters(chosen),
            preserve_energy=energy,
            seed=int(seed),
            lorakit_version=__version__,
            _backups=backups,
            _adapter=adapter,
        )
        _exchange(backups, undo=False, then=lambda: add_record(adapter, measured.adapter_name, report))
    return report


def _parameters(policy: Any) -> dict[str, Any]:
    return asdict(policy) if is_dataclass(policy) and not isinstance(policy, type) else {}


def _exchange(backups: list[_Backup], *, undo: bool, then: Callable[[], None]) -> None:
    """Give every module its factors after the edit (or, `undo`, before it) and do `then`; or leave all as it was."""
    try:
        for backup in backups:
            _write(backup.module, backup.before if undo else backup.after)
        then()
    except BaseException:
        for backup in backups:
            _write(backup.module, backup.after if undo else backup.before)
        raise


def _checked(proposed: Any, sigma: Tensor, module_name: str) -> Tensor:
    if not isinstance(proposed, Tensor) or proposed.shape != sigma.shape or not torch.isfinite(proposed).all():
        got = f"{proposed}" if isinstance(proposed, Tensor) else type(proposed).__name__
        raise SurgeryError(
            f"The policy must return {sigma.shape[0]} finite singular values for {module_name!r}; got {got}."
        )
    return proposed.to(sigma)


def _row(
    item: Decomposed, sigma: Tensor, g: Tensor, proposed: Tensor, edited: Tensor, per_example: Tensor
) -> EditedRow:
    total = proposed.sum()
    return EditedRow(
        module_name=item.module.name,
        role=item.module.role,
        rank=item.module.rank,
        scaling=item.module.scaling,
        singular_values=sigma.tolist(),
        sensitivity=g.tolist(),
        per_example=per_example,
        gate=torch.where(sigma > 0, proposed / torch.where(sigma > 0, sigma, 1), 1).tolist(),
        energy_scale=float(edited.sum() / total) if total > 0 else 1.0,
        edited_singular_values=edited.tolist(),
    )


def _new_factors(
    item: Decomposed, edited: Tensor, sigma: Tensor, before: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(B′, A′) in the stored shapes and dtypes; the stored factors themselves where nothing changes."""
    if torch.equal(edited, sigma):
        return before
    factors = LowRank.from_svd(item.U, edited.to(item.S), item.Vh, item.module.scaling)
    B, A = torch.zeros_like(before[0]), torch.zeros_like(before[1])
    B[:, : factors.B.shape[1]] = factors.B
    A[: factors.A.shape[0]] = factors.A
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise SurgeryError(
            f"The edited singular values of {item.module.name!r}, up to {float(edited.max()):.3g}, are too large for "
            f"{B.dtype}."
        )
    return B, A


def _factors(module: LiveModule) -> tuple[Tensor, Tensor]:
    return read_weight(module.up).clone(), read_weight(module.down).clone()


def _write(module: LiveModule, factors: tuple[Tensor, Tensor]) -> None:
    write_weight(module.up, factors[0])
    write_weight(module.down, factors[1])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.to(b.device), b)
