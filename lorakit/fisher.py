"""How steep the loss is in each adapted module: the diagonal empirical Fisher information of its lora_B.

F = E_i[(∂ℓ_i/∂B)²], the mean over examples of squared per-example gradients ("LoRA-Lens", section 3.2), ℓ_i being
example i's own mean loss. At each lora_B, with input a (T, r) and output gradient δ (T, d_out) of one example, that
gradient is δᵀ a: so one forward and backward of a batch, with every parameter frozen, gives those of all its examples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lorakit._distributed import unwrapped, whole
from lorakit._plotting import new_figure
from lorakit.adapters.live import LiveModule, live_modules, read_weight, resolve_adapter_name
from lorakit.calibration import LossFn, activated, collect, preserved_rng, preserved_state
from lorakit.errors import CalibrationError, UnsupportedModelError
from lorakit.tuners.fisherlora import default_targets
from lorakit.tuners.module_tree import module_tree, restore
from lorakit.tuners.roles import ROLES, Role, layer_of, role_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = ("B", "A", "weight")
TEMPORARY_RANK = 16
TEMPORARY_ALPHA = 32  # a scaling of 2
LEARNING_RATE = 2e-4
# On a CPU short examples gain from being run together, while the matrices are small; from some hundred tokens on there
# is nothing left to gain, and the logits of a large vocabulary take the more memory. On an accelerator a batch is run
# as it comes.
CPU_TOKENS = 384


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, or what follows from such means, and its standard error; None for a single example."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class FisherRow:
    """One module. `fisher` is the mean of F over the d_out · rank entries of its lora_B; `params` are its adapter's
    parameters, rank · (d_in + d_out).

    `factor_a` and `weight` are the same for the entries of lora_A and of the dense weight, None unless asked for.
    """

    module_name: str
    role: Role | None
    layer: int | None
    d_out: int
    d_in: int
    rank: int
    scaling: float
    params: int
    fisher: float
    stderr: float | None
    factor_a: Estimate | None
    weight: Estimate | None


@dataclass(frozen=True, eq=False)
class Moments:
    """What stays in memory of a module: `per_example` (n,), the mean squared gradient of lora_B's entries for each
    example; and of the dense weight, where asked for, `weight_rows` (d_out,) Σ_j F_oj and `weight_columns` (d_in,)
    Σ_o F_oj. All float64, on the CPU."""

    per_example: Tensor
    weight_rows: Tensor | None
    weight_columns: Tensor | None


@dataclass(frozen=True)
class FisherGroup:
    """Modules of one role or layer together: the mean over all the entries of their lora_B."""

    role: Role | None
    layer: int | None
    modules: int
    params: int
    fisher: float
    stderr: float | None


@dataclass(frozen=True)
class FisherReport:
    """The Fisher information of an adapter's modules, over `num_examples` examples.

    `num_without_labels` more had no label that enters the loss and were left out. `temporary` says that the adapter was
    attached for the probe alone, and after how many `train_steps`. `target_modules` names what was probed, as a config
    takes it. `unprobed` are modules of the adapter that are no linear ones. `moments` holds what is not in `to_dict`.
    """

    modules: tuple[FisherRow, ...]
    target_modules: tuple[str, ...]
    num_examples: int
    num_without_labels: int
    temporary: bool
    train_steps: int
    seed: int
    unprobed: tuple[str, ...]
    moments: dict[str, Moments]

    @property
    def roles(self) -> tuple[FisherGroup, ...]:
        """One group for each role, the modules that have none together at the end."""
        present = [role for role in (*ROLES, None) if any(row.role == role for row in self.modules)]
        return tuple(self._group([row for row in self.modules if row.role == role], role, None) for role in present)

    @property
    def layers(self) -> tuple[FisherGroup, ...]:
        """One group for each layer, by its index, the modules that lie in none together at the end."""
        present = sorted({row.layer for row in self.modules}, key=lambda layer: (layer is None, layer))
        return tuple(self._group([row for row in self.modules if row.layer == i], None, i) for i in present)

    @property
    def vq_ratio(self) -> Estimate | None:
        """Mean F over the value projections' lora_B entries over that of the query projections, with its standard error
        (first order, examples paired); None where one of them is missing or the queries' is 0."""
        value, query = (
            self._per_example([row for row in self.modules if row.role == role]) for role in ("value", "query")
        )
        if value is None or query is None or not query.any():
            return None
        ratio = float(value.mean() / query.mean())
        return Estimate(ratio, _stderr((value - ratio * query) / query.mean()))

    def _per_example(self, rows: Sequence[FisherRow]) -> Tensor | None:
        """For each example, the mean squared gradient over all the rows' lora_B entries."""
        if not rows:
            return None
        entries = torch.tensor([row.d_out * row.rank for row in rows], dtype=torch.float64)
        stacked = torch.stack([self.moments[row.module_name].per_example for row in rows])
        return entries @ stacked / entries.sum()

    def _group(self, rows: Sequence[FisherRow], role: Role | None, layer: int | None) -> FisherGroup:
        values = cast(Tensor, self._per_example(rows))
        params = sum(row.params for row in rows)
        return FisherGroup(role, layer, len(rows), params, float(values.mean()), _stderr(values))

    def to_dict(self) -> dict[str, Any]:
        """All but the moments, as plain lists, numbers and strings that JSON takes."""
        ratio = self.vq_ratio
        return {
            "num_examples": self.num_examples,
            "num_without_labels": self.num_without_labels,
            "temporary": self.temporary,
            "train_steps": self.train_steps,
            "seed": self.seed,
            "target_modules": list(self.target_modules),
            "unprobed": list(self.unprobed),
            "vq_ratio": None if ratio is None else {"value": ratio.value, "stderr": ratio.stderr},
            "roles": [{k: v for k, v in vars(group).items() if k != "layer"} for group in self.roles],
            "layers": [{k: v for k, v in vars(group).items() if k != "role"} for group in self.layers],
            "modules": [_plain(row) for row in self.modules],
        }

    def plot(self) -> Figure:
        """F by layer, one line a role, with standard errors, on a logarithmic axis.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        for role in dict.fromkeys(row.role for row in self.modules):
            rows = [row for row in self.modules if row.role == role and row.fisher > 0]
            places = [i if row.layer is None else row.layer for i, row in enumerate(rows)]
            errors = [row.stderr or 0.0 for row in rows]
            axes.errorbar(places, [row.fisher for row in rows], yerr=errors, fmt="o-", ms=4, capsize=2, label=str(role))
        axes.set_yscale("log")
        ratio = self.vq_ratio
        title = f"Fisher information of lora_B, {self.num_examples} examples"
        axes.set(xlabel="layer", ylabel="mean squared gradient of an entry")
        axes.set_title(title if ratio is None else f"{title}; V/Q = {ratio.value:.3g}")
        axes.legend()
        return figure


def probe(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    target_modules: str | Sequence[str] | None = None,
    num_examples: int = 16,
    seed: int = 0,
    factors: Sequence[str] = ("B",),
    loss_fn: LossFn | None = None,
    train_loader: Iterable[Any] | None = None,
    train_steps: int = 50,
    learning_rate: float = LEARNING_RATE,
    adapter_name: str | None = None,
    progress: bool = True,
) -> FisherReport:
    """Measure the diagonal empirical Fisher information of every adapted module's lora_B, and change nothing.

    Args:
        model: a base model, which gets a temporary LoRA (r = 16, scaling 2, lora_A drawn from `seed`, lora_B = 0) and
            loses it again; or a PeftModel with a LORA, FISHERLORA or SPECLORA adapter, at any point of its training.
        loader: yields mappings for ``model(**batch)`` with labels, or anything that `loss_fn` takes.
        target_modules: matched as PEFT matches its own. None is the query and value projections of a base model, and
            every linear module that the adapter of a PeftModel has.
        num_examples: how many examples to use; fewer are used where the loader has fewer.
        factors: what besides "B" to measure: "A" is lora_A (zero while lora_B is); "weight" the dense weight W, whose
            per-example gradient G = δᵀ x (d_out, d_in) is never formed. Its row sums Σ_j G_oj² are
            Σ_ts δ_to δ_so (x_t · x_s), and its column sums Σ_o G_oj² are Σ_ts x_tj x_sj (δ_t · δ_s): they come from the
            T × T Gram matrices of x and of δ, exact, with no Kronecker factors taken to be independent.
        loss_fn: ``loss_fn(model, batch)`` returns the losses (n,) of a batch's examples.
        train_loader: of a base model only: first train the temporary LoRA on its batches (over and over if need be) for
            `train_steps` steps of AdamW at `learning_rate` (2e-4, no weight decay, gradients clipped to norm 1), as in
            the paper's probe after about 50 steps. In eval mode, so that nothing of the base changes.
        adapter_name: which adapter of a PeftModel; needed where not exactly one is active.
        progress: show a progress bar on stderr.

    Each example's gradients belong to its own mean loss, whatever the batch size, the order and the padding. On the CPU
    large batches are run in parts. Several processes: see `lorakit.calibration.collect`.

    Raises: ValueError or TypeError subclasses of lorakit's where the model, the modules or the data are unfit; what the
    loader, the model and `loss_fn` raise passes through. Either way the model, its flags, its adapters and the random
    number generators are as they were.
    Reference: "LoRA-Lens", sections 3.2 and 4.
    """
    wanted = set(factors) | {"B"}
    if not wanted <= set(FACTORS):
        raise ValueError(f"`factors` must be among {', '.join(FACTORS)}; got {list(factors)!r}.")
    if isinstance(train_steps, bool) or not isinstance(train_steps, int) or train_steps < 1:
        raise ValueError(f"`train_steps` must be a positive integer; got {train_steps!r}.")
    model = unwrapped(model)
    temporary = not isinstance(model, PeftModel)
    if not temporary and train_loader is not None:
        raise ValueError(
            "`train_loader` trains a temporary LoRA on a base model; a PeftModel has an adapter of its own."
        )
    if temporary and adapter_name is not None:
        raise ValueError(f"`adapter_name` is for a PeftModel; the model is a {type(model).__name__}.")
    unprobed: list[str] = []
    with contextlib.ExitStack() as stack:
        if temporary:
            modules = stack.enter_context(temporary_lora(model, target_modules, seed))
            if train_loader is not None:
                _train(model, modules, train_loader, loss_fn, train_steps, learning_rate, progress)
        else:
            adapter_name = resolve_adapter_name(cast(PeftModel, model), adapter_name)
            modules, unprobed = _select(cast(PeftModel, model), adapter_name, target_modules, wanted)
            stack.enter_context(activated(cast(PeftModel, model), adapter_name))
        targets = _target_names(model, [module.name for module in modules])
        taps = [stack.enter_context(_tapped(module, wanted)) for module in modules]
        collected = collect(
            model,
            loader,
            taps,
            num_examples=num_examples,
            loss_fn=loss_fn,
            progress=progress,
            description="Fisher information",
            max_tokens=CPU_TOKENS if next(model.parameters()).device.type == "cpu" else math.inf,
        )
        results = [
            _row(module, tap, statistic)
            for module, tap, statistic in zip(modules, taps, collected.statistics, strict=True)
        ]
    return FisherReport(
        modules=tuple(row for row, _ in results),
        target_modules=targets,
        num_examples=collected.num_examples,
        num_without_labels=collected.num_without_labels,
        temporary=temporary,
        train_steps=train_steps if train_loader is not None else 0,
        seed=seed,
        unprobed=tuple(unprobed),
        moments={row.module_name: moments for row, moments in results},
    )


class _Tap(nn.Module):
    """Stands in for lora_B: computes what it computes, and reads each example's gradient off what comes back.

    Its statistic of an example is (n, k): the root of the mean squared gradient of B's entries, then by option of A's,
    then the roots of W's row and column sums: proportional to the gradient, as the pass weighs them.
    """

    def __init__(self, module: LiveModule, factors: set[str]) -> None:
        super().__init__()
        up = module.up
        self.weight = read_weight(up)
        bias = getattr(up, "bias", None)
        if bias is not None and bias.is_meta:
            raise UnsupportedModelError(f"{module.name!r} has an offloaded `lora_bias`, which the probe does not read.")
        self.bias = None if bias is None else whole(bias.detach())
        self.scaling = module.scaling
        self.d_in = int(cast(Any, module.down).weight.shape[1])
        self.factors = factors
        # A branch that adds nothing need not be computed, nor gone back through.
        self.idle = self.bias is None and not bool(self.weight.any())
        self.begin(one_example=False)

    def begin(self, *, one_example: bool) -> None:
        self.one_example = one_example
        self.separable = True
        self.ran_without_grad = False
        self.calls = 0
        self.input: Tensor | None = None
        self.sizes: set[int] = set()
        self.gradients: dict[str, Tensor] = {}
        self.statistic: Tensor | None = None

    def forward(self, a: Tensor) -> Tensor:
        d_out = self.weight.shape[0]
        if not torch.is_grad_enabled():
            self.ran_without_grad = True
            return F.linear(a, self.weight, self.bias)
        x, self.input = self.input, None
        self.calls += 1
        n = 1 if self.one_example or a.ndim == 1 else a.shape[0]
        if not self.one_example:
            # Tokens of one example must share the first index. Two dimensions may be tokens of all examples in a row,
            # and equal leading ones may be time first: neither is certain.
            self.separable &= n == 1 or (a.ndim >= 3 and a.shape[1] != n)
        self.sizes.add(n)
        zero = a.new_zeros(()).expand(*a.shape[:-1], d_out)
        out = zero if self.idle else F.linear(a, self.weight, self.bias)
        kept = a.detach()
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        cast(Any, out).register_hook(lambda gradient: self._receive(n, kept, x, gradient))
        return out

    @torch.no_grad()
    def _receive(self, n: int, a: Tensor, x: Tensor | None, gradient: Tensor) -> None:
        if not self.separable:
            return
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        a, delta = (t.reshape(n, -1, t.shape[-1]).to(dtype) for t in (a, gradient))
        found = {"B": torch.bmm(delta.mT, a)}
        if x is not None:
            x = x.reshape(n, -1, x.shape[-1]).to(dtype)
            if "A" in self.factors:
                found["A"] = torch.bmm((delta @ self.weight.to(dtype)).mT, x)
            if "weight" in self.factors:
                found["x"], found["delta"] = x, delta / self.scaling
        for name, value in found.items():
            known = self.gradients.get(name)
            if known is not None:  # the module was used more than once: gradients add up, before they are squared
                value = torch.cat([known, value], dim=1) if name in ("x", "delta") else known + value
            self.gradients[name] = value
        if self.calls == 1 and not self.ran_without_grad:
            self.statistic, self.gradients = self._reduce(), {}

    def _reduce(self) -> Tensor:
        parts = []
        for name in ("B", "A"):
            if name in self.factors:
                gradient = self.gradients[name]
                count = gradient.shape[1] * gradient.shape[2]
                parts.append(torch.linalg.vector_norm(gradient, dim=(1, 2)).unsqueeze(1) / math.sqrt(count))
        if "weight" in self.factors:
            x, delta = self.gradients["x"], self.gradients["delta"]
            for left, right in ((delta, x), (x, delta)):
                squares = (torch.bmm(torch.bmm(right, right.mT), left) * left).sum(1)
                parts.append(squares.clamp(min=0).sqrt())
        return torch.cat(parts, dim=1)

    def collect(self, num_examples: int) -> Tensor | None:
        if self.ran_without_grad and not self.calls:
            raise CalibrationError(
                "An adapted module ran without gradients, so its Fisher information cannot be measured. If the model "
                "uses reentrant gradient checkpointing, switch it to use_reentrant=False."
            )
        if not self.separable or not self.sizes <= {num_examples}:
            return None
        if self.gradients:
            self.statistic, self.gradients = self._reduce(), {}
        if self.statistic is None:  # it did not run, or nothing of it reached the loss
            widths = {"B": 1, "A": 1, "weight": self.weight.shape[0] + self.d_in}
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return self.weight.new_zeros(num_examples, sum(widths[name] for name in self.factors), dtype=dtype)
        return self.statistic


@contextlib.contextmanager
def _tapped(module: LiveModule, factors: set[str]) -> Iterator[_Tap]:
    layer, name = module.layer, module.adapter_name
    up, down = layer.lora_B[name], module.down
    tap = _Tap(module, factors)
    handle = None

    def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        tap.input = arguments[0].detach()

    try:
        if factors - {"B"}:
            handle = down.register_forward_pre_hook(see)
        layer.lora_B[name] = tap
        yield tap
    finally:
        layer.lora_B[name] = up
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def temporary_lora(
    model: nn.Module, target_modules: str | Sequence[str] | None, seed: int
) -> Iterator[list[LiveModule]]:
    """Give a base model a LoRA (r = 16, scaling 2, lora_A drawn from `seed`, lora_B = 0) and take it out again.

    Raises: UnsupportedModelError for a model that has adapters; what PEFT raises for targets that it does not find.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "The model has adapters, but is no PeftModel. Pass the PeftModel, or the base model without them."
        )
    targets = sorted(default_targets(model)) if target_modules is None else target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=TEMPORARY_RANK, lora_alpha=TEMPORARY_ALPHA, target_modules=targets)
    tree = module_tree(model)
    attributes = dict(vars(model))
    name = "default"
    with preserved_state(model):
        try:
            with preserved_rng(model):
                torch.manual_seed(seed)
                inject_adapter_in_model(config, model, name)
            modules = [
                LiveModule(path, layer, name) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)
            ]
            unfit = [module for module in modules if not module.is_linear()]
            if unfit:
                raise UnsupportedModelError(
                    f"The probe measures linear modules; {unfit[0].name!r} is a {type(unfit[0].layer).__name__} layer. "
                    f"Leave it out of `target_modules`."
                )
            yield modules
        finally:
            restore(tree)
            for attribute in set(vars(model)) - set(attributes):
                delattr(model, attribute)


def _train(
    model: nn.Module,
    modules: Sequence[LiveModule],
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    steps: int,
    learning_rate: float,
    progress: bool,
) -> None:
    """Train the temporary LoRA; in eval mode, with the base frozen."""
    parameters = [p for module in modules for factor in (module.down, module.up) for p in factor.parameters()]
    device = parameters[0].device
    call = cast(Callable[..., Any], model)
    with preserved_state(model), preserved_rng(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        batches = _over_and_over(loader)
        with tqdm(total=steps, desc="training the probe", unit="step", disable=not progress, delay=1.0) as bar:
            for _ in range(steps):
                batch = send_to_device(next(batches), device)
                loss = call(**batch).loss if loss_fn is None else loss_fn(model, batch).mean()
                if loss is None or not torch.isfinite(loss):
                    raise CalibrationError(f"The loss while training the temporary LoRA is {loss}.")
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()


def _over_and_over(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise CalibrationError(
                "`train_loader` yielded no batch, or cannot be run through again; pass a list or a DataLoader."
            )


def _select(
    model: PeftModel, adapter_name: str, target_modules: str | Sequence[str] | None, factors: set[str]
) -> tuple[list[LiveModule], list[str]]:
    """The adapter's linear modules that are meant, and the names of those meant that are none."""
    available = live_modules(model, adapter_name)
    chosen = available
    if target_modules is not None and target_modules != "all-linear":
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(target_modules=targets)
        chosen = [module for module in available if check_target_module_exists(config, module.name)]
    modules = [module for module in chosen if module.is_linear()]
    if not modules:
        leaves = sorted({module.name.rpartition(".")[2] for module in available})
        raise UnsupportedModelError(
            f"Adapter {adapter_name!r} has no linear module that matches target_modules={target_modules!r}. It adapts "
            f"{len(available)} modules named {leaves}; pass some of these names as `target_modules`."
        )
    for module in modules:
        layer = module.layer
        if layer.merged:
            raise UnsupportedModelError(
                f"Adapters {layer.merged_adapters} are merged into {module.name!r}, so that its lora_B takes no "
                f"part in the forward pass. Call unmerge_adapter() first."
            )
        if "weight" in factors and module.scaling == 0:
            raise UnsupportedModelError(
                f"The adapter of {module.name!r} is scaled to 0, so that nothing reaches its output's gradient; leave "
                f"'weight' out of `factors`, or set the scale back."
            )
        if layer.disable_adapters:
            raise UnsupportedModelError(f"The adapters of {module.name!r} are disabled; enable them first.")
        if layer.use_dora.get(adapter_name) or adapter_name in layer.lora_variant:
            raise UnsupportedModelError(
                f"{module.name!r} uses a variant of LoRA (DoRA or another), whose lora_B is more than a factor; the "
                f"probe measures plain low-rank updates. Probe the base model instead."
            )
    return modules, [module.name for module in chosen if not module.is_linear()]


def _target_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The shortest `target_modules` that mean these modules and no others."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    leaves = {name.rpartition(".")[2] for name in names}
    found = {name for name, _ in cast(nn.Module, base).named_modules() if name.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves)) if found == set(names) else tuple(names)


def _row(module: LiveModule, tap: _Tap, statistic: Tensor) -> tuple[FisherRow, Moments]:
    """A module's row from the roots of the examples' mean squares (n, k)."""
    squares = statistic.detach().to("cpu", torch.float64) ** 2
    d_out, rank = tap.weight.shape
    widths = [1, *([1] if "A" in tap.factors else []), *([d_out, tap.d_in] if "weight" in tap.factors else [])]
    parts = list(torch.split(squares, widths, dim=1))
    per_example = parts.pop(0).squeeze(1)
    a = _estimate(parts.pop(0).squeeze(1)) if "A" in tap.factors else None
    rows, columns = parts if parts else (None, None)
    weight = None if rows is None else _estimate(rows.sum(1) / (d_out * tap.d_in))
    found = _estimate(per_example)
    row = FisherRow(
        module_name=module.name,
        role=role_of(module.name),
        layer=layer_of(module.name),
        d_out=d_out,
        d_in=tap.d_in,
        rank=rank,
        scaling=module.scaling,
        params=rank * (d_out + tap.d_in),
        fisher=found.value,
        stderr=found.stderr,
        factor_a=a,
        weight=weight,
    )
    mean_rows, mean_columns = (None if value is None else value.mean(0) for value in (rows, columns))
    return row, Moments(per_example, mean_rows, mean_columns)


def _estimate(per_example: Tensor) -> Estimate:
    return Estimate(float(per_example.mean()), _stderr(per_example))


def _stderr(per_example: Tensor) -> float | None:
    n = per_example.shape[0]
    return float(per_example.std() / math.sqrt(n)) if n > 1 else None


def _plain(row: FisherRow) -> dict[str, Any]:
    return {key: vars(value) if isinstance(value, Estimate) else value for key, value in vars(row).items()}
