"""The edit itself: decompose, measure, reweight, write back; whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from lorakit._checks import check_seed
from lorakit._distributed.shards import from_first
from lorakit._version import __version__
from lorakit.calibration.losses import LossFn
from lorakit.calibration.state import no_inference_mode, preserved_rng
from lorakit.errors import SurgeryError
from lorakit.evaluation import LoadOptions
from lorakit.spectral import LowRank
from lorakit.surgery._edit import Backup, SurgeryReport, exchange, factors_of
from lorakit.surgery._live import live
from lorakit.surgery._policies import ENERGIES, Aggregate, Policy, preserve, resolve_policy
from lorakit.surgery._report import EditedRow
from lorakit.surgery._sensitivity import Measured, aggregate_examples, check_aggregate, measure
from lorakit.surgery._singular_value_probe import Decomposed


@no_inference_mode()
def reweight(
    adapter: PeftModel | str | os.PathLike[str],
    loader: Any,
    *,
    policy: str | Policy = "smooth_abs",
    target_modules: str | Sequence[str] | None = None,
    aggregate: Aggregate | None = None,
    preserve_energy: Literal["l1", "l2", "none"] | None = "l1",
    num_examples: int = 128,
    loss_fn: LossFn | None = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    base: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SurgeryReport:
    """Reweight the singular values of a trained adapter's update by their sensitivities, in place.

    Each selected module's ΔW = U diag(σ) Vh keeps U and Vh. The policy maps σ and the sensitivities g to σ′, which is
    clamped at 0 and rescaled to the sum of σ (`preserve_energy` "l1"), to its 2-norm ("l2") or not at all ("none").
    The result is written back in the stored rank, dtype and names as B′ = U √(σ′/scaling), A′ = √(σ′/scaling) Vh: the
    adapter's type does not change.

    Args:
        adapter, loader, target_modules, num_examples, loss_fn, adapter_name, tokenizer, base, options, progress: see
            `sensitivity`. An adapter on disk is edited in memory; the report's `save` writes it.
        policy: a name (abs_select, smooth_abs, random_index, grad_direction, double_smooth, z_score, robust_z) or a
            policy object, such as ``AbsSelect(core_frac=0.3)``.
        aggregate: None is what the policy needs: ``mean`` (signed) for grad_direction, ``mean_abs`` for the others.
        seed: for policies that draw at random.

    Returns: a report, with `undo()` and `save(directory)`.
    Raises: as `sensitivity`; ValueError or TypeError for an unknown policy; SurgeryError if a policy's result cannot be
    used. If anything is raised, by the loader, the model, the policy or Ctrl-C, the model is as it was.
    Reference: Tian et al., "Spectral Surgery", 2026, section 3.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(base, config)
        >>> loss_fn = lambda model, batch: model(batch).square().mean((1, 2))
        >>> batches = [torch.randn(4, 5, 8) for _ in range(2)]
        >>> edit = reweight(
        ...     model, batches, policy="abs_select", target_modules=["0"], loss_fn=loss_fn, progress=False
        ... )
        >>> sorted(edit.modules[0].gate)
        [1.0, 1.25]
        >>> edit.undo()
    """
    chosen = resolve_policy(policy)
    aggregate = chosen.aggregate if aggregate is None else aggregate
    check_aggregate(aggregate)
    energy = "none" if preserve_energy is None else preserve_energy
    if energy not in ENERGIES:
        raise ValueError(f"`preserve_energy` must be one of {', '.join(ENERGIES)}; got {preserve_energy!r}.")
    seed = check_seed("seed", seed)
    given = live(adapter, base, options, tokenizer)
    measured = measure(
        given.model,
        loader,
        target_modules=target_modules,
        num_examples=num_examples,
        loss_fn=loss_fn,
        adapter_name=adapter_name,
        progress=progress,
        tokenizer=given.tokenizer_of(loader),
    )
    edit_id = from_first(uuid.uuid4().hex, loader)
    with preserved_rng(given.model):  # a policy may draw from other generators than its own
        plan = plan_edit(measured, chosen, aggregate, energy, torch.Generator().manual_seed(seed))
        report = edit_report(
            given.model,
            measured,
            plan,
            aggregate=aggregate,
            edit_id=edit_id,
            policy=policy if isinstance(policy, str) else type(chosen).__name__,
            policy_parameters=_parameters(chosen),
            preserve_energy=energy,
            seed=seed,
            _source=given.source,
        )
        exchange([backup for _, backup in plan])
    return report


Plan = list[tuple[EditedRow, Backup]]


def plan_edit(
    measured: Measured, policy: Policy, aggregate: Aggregate, energy: str, generator: torch.Generator
) -> Plan:
    """For each module what the edit will do, and its factors before and after; nothing is written yet."""
    return _with_factors(measured, policy_rows(measured, policy, aggregate, energy, generator))


def plan_of(
    measured: Measured, propose: Callable[[Decomposed, Tensor], Tensor], aggregate: Aggregate, energy: str
) -> Plan:
    """`plan_edit` with the new singular values (m,) of a module that `propose` gives for its sensitivities (m,)."""
    return _with_factors(measured, _rows(measured, propose, aggregate, energy))


def policy_rows(
    measured: Measured, policy: Policy, aggregate: Aggregate, energy: str, generator: torch.Generator
) -> list[EditedRow]:
    """What `plan_edit` will do to each module, without the factors."""

    def propose(item: Decomposed, g: Tensor) -> Tensor:
        sigma = item.S.detach().double().cpu()
        return _checked(policy(sigma.clone(), g.clone(), generator=generator), sigma, item.module.name)

    return _rows(measured, propose, aggregate, energy)


def _rows(
    measured: Measured, propose: Callable[[Decomposed, Tensor], Tensor], aggregate: Aggregate, energy: str
) -> list[EditedRow]:
    rows = []
    for item, per_example in zip(measured.modules, measured.per_example, strict=True):
        g = aggregate_examples(per_example, aggregate)
        sigma = item.S.detach().double().cpu()
        proposed = propose(item, g)
        edited = preserve(proposed, sigma, energy)
        kept, total = proposed.clamp(min=0), float(proposed.clamp(min=0).sum())
        row = EditedRow(
            module_name=item.module.name,
            role=item.module.role,
            rank=item.module.rank,
            scaling=item.module.scaling,
            singular_values=sigma.tolist(),
            sensitivity=g.tolist(),
            per_example=per_example,
            gate=torch.where(sigma > 0, kept / torch.where(sigma > 0, sigma, 1), 1).nan_to_num().tolist(),
            energy_scale=float(edited.sum()) / total if total > 0 else 1.0,
            edited_singular_values=edited.tolist(),
        )
        rows.append(row)
    return rows


def _with_factors(measured: Measured, rows: Sequence[EditedRow]) -> Plan:
    plan = []
    for item, row in zip(measured.modules, rows, strict=True):
        before = factors_of(item.module)
        sigma, edited = (
            torch.tensor(values, dtype=torch.float64) for values in (row.singular_values, row.edited_singular_values)
        )
        plan.append((row, Backup(item.module, before, _new_factors(item, edited, sigma, before))))
    return plan


def edit_report(adapter: PeftModel, measured: Measured, plan: Plan, **edit: Any) -> SurgeryReport:
    """The report of an edit that was planned; `edit` are the fields of `SurgeryReport` that say what it is."""
    return SurgeryReport(
        model_name=measured.model_name,
        adapter_name=measured.adapter_name,
        num_examples=measured.collected.num_examples,
        num_without_labels=measured.collected.num_without_labels,
        zero_modules=measured.zero_modules,
        idle_modules=measured.idle_modules,
        modules=[row for row, _ in plan],
        lorakit_version=__version__,
        _backups=[backup for _, backup in plan],
        _model=adapter,
        **edit,
    )


def _parameters(policy: Any) -> dict[str, Any]:
    """A policy's parameters as JSON data; those that are not are given by their repr."""
    if not is_dataclass(policy) or isinstance(policy, type):
        return {}
    parameters: dict[str, Any] = json.loads(json.dumps(asdict(policy), default=repr))
    return parameters


def _checked(proposed: Any, sigma: Tensor, module_name: str) -> Tensor:
    if not isinstance(proposed, Tensor) or proposed.shape != sigma.shape or not torch.isfinite(proposed).all():
        got = f"{proposed}" if isinstance(proposed, Tensor) else type(proposed).__name__
        raise SurgeryError(
            f"The policy must return {sigma.shape[0]} finite singular values for {module_name!r}; got {got}."
        )
    return proposed.to(sigma)


def _new_factors(
    item: Decomposed, edited: Tensor, sigma: Tensor, before: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(B′, A′) in the stored shapes and dtypes; `before` if nothing changes.

    Raises: SurgeryError if they are too large for the stored dtype.
    """
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
