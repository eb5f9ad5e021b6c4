"""κ in given subspaces: against the float64 reference of its definition, and what is refused before training."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from lorakit import SpecLoRAConfig, lens
from lorakit.experiments import pilot
from lorakit.lens import Snapshot, SpectralCallback, Trajectory, training_report

CONFIGS = {
    "LORA": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "DROPOUT": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "DORA": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "SPECLORA": lambda: SpecLoRAConfig(r=4, k=6, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture
def batch():
    ids = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def layers_of(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}


def random_basis(model, q=3):
    """Orthonormal U (d_out, q) and V (d_in, q) for each layer, float64."""
    generator = torch.Generator().manual_seed(11)

    def columns(d):
        return torch.linalg.qr(torch.randn(d, q, generator=generator, dtype=torch.float64)).Q

    return {name: (columns(layer.out_features), columns(layer.in_features)) for name, layer in layers_of(model).items()}


def dense_gradients(model, batch):
    """G = Σ_t δ_t x_tᵀ of each layer, in float64, from its inputs and its output's gradient."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, layer in layers_of(model).items()
    ]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    deltas = torch.autograd.grad(loss, [output for _, output in seen.values()])
    return {
        name: torch.einsum("nto,nti->oi", delta.double(), x.detach().double()).numpy()
        for (name, (x, _)), delta in zip(seen.items(), deltas, strict=True)
    }


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_kappa_in_a_given_basis_is_that_of_the_definition(tiny_llama, randomize, batch, kind, prefix):
    model = randomize(get_peft_model(tiny_llama(torch.float64), CONFIGS[kind]())).double().eval()
    basis = random_basis(model)
    with lens.watch_gradients(
        model, basis={prefix + name: pair for name, pair in basis.items()}, projections=8192
    ) as gradients:
        model(**batch).loss.backward()
    seen = lens.snapshot(model, gradients=gradients)
    assert {row.module_name for row in seen.modules} == set(basis)
    shares = []
    for row in seen.modules:
        U, V = (part.numpy() for part in basis[row.module_name])
        G = dense_gradients(model, batch)[row.module_name]
        expected = np.linalg.norm(U.T @ G @ V)
        assert gradients.overlaps[row.module_name].seen_norm == pytest.approx(expected, rel=1e-9)
        assert row.kappa == pytest.approx(expected / np.linalg.norm(G), rel=0.05)
        assert row.kappa_chance == pytest.approx(3 / math.sqrt(G.size))
        shares.append((expected**2, np.linalg.norm(G) ** 2))
    captured, whole = np.sum(shares, 0)
    assert seen.total.kappa == pytest.approx(math.sqrt(captured / whole), rel=0.03)
    assert seen.kappa_basis == "given subspaces of dimension 3"


def test_a_whole_basis_holds_all_of_the_gradient_and_an_orthogonal_one_nothing(randomize):
    model = randomize(get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"])))
    x, delta = torch.randn(7, 6), torch.randn(7, 5)
    U, _, Vh = torch.linalg.svd(delta.mT @ x)
    found = []
    for columns in (slice(0, 5), slice(0, 1)):
        with lens.watch_gradients(model, basis={"0": (U[:, columns], Vh.mT[:, columns])}, projections=4096) as watch:
            (model(x) * delta).sum().backward()
        found.append(watch.overlaps["0"])
    G = delta.mT @ x
    assert found[0].seen_norm == pytest.approx(float(G.norm()), rel=1e-5)
    assert found[0].kappa <= 1
    assert found[1].seen_norm == pytest.approx(float(torch.linalg.matrix_norm(G, 2)), rel=1e-5)
    with lens.watch_gradients(model, basis={"0": (U[:, :1], Vh.mT[:, 5:])}) as watch:
        (model(x) * delta).sum().backward()
    assert watch.overlaps["0"].kappa < 1e-5


def test_an_adapter_of_zeros_has_a_kappa_in_a_pilots_subspace(tiny_llama, batch):
    """The pilot's own batch: at step 0 κ is what the sketch captured of its gradient."""
    base = tiny_llama().eval()
    sketch = pilot.gradient_subspaces(base, [batch], num_batches=1, rank=4, progress=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with lens.watch_gradients(model, basis=sketch, projections=4096) as gradients:
        model(**batch).loss.backward()
    seen = lens.snapshot(model, gradients=gradients)
    for row in seen.modules:
        G = dense_gradients(model, batch)[row.module_name]
        U, V = (part.double().numpy() for part in sketch.bases[row.module_name])
        assert row.effective_rank == 0
        assert row.kappa == pytest.approx(np.linalg.norm(U.T @ G @ V) / np.linalg.norm(G), rel=0.05)
        best = np.linalg.svd(G, compute_uv=False)
        assert row.kappa >= 0.9 * np.linalg.norm(best[:4]) / np.linalg.norm(best)
    assert seen.kappa_basis == "gradient subspaces of rank 4 (1 batch, seed 0)"
    assert "κ in gradient subspaces of rank 4" in str(seen)
    assert Snapshot.from_dict(json.loads(json.dumps(seen.to_dict()))) == seen


@pytest.mark.slow
def test_the_directions_of_a_full_fine_tuning_are_a_basis(tiny_llama, batch):
    base = tiny_llama().eval()
    report = pilot.update_spectra(base, [batch], steps=1, batch_size=None, learning_rate=1e-4, rank=6, progress=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with lens.watch_gradients(model, basis=report, projections=4096) as gradients:
        model(**batch).loss.backward()
    seen = lens.snapshot(model, gradients=gradients)
    assert seen.kappa_basis == report.description
    assert "rank 6 of ΔW after 1 step " in seen.kappa_basis
    for row in seen.modules:
        G = dense_gradients(model, batch)[row.module_name]
        U, V = (part.double().numpy() for part in report.bases[row.module_name])
        assert row.kappa == pytest.approx(np.linalg.norm(U.T @ G @ V) / np.linalg.norm(G), rel=0.05)


def test_half_precision_and_micro_batches(tiny_llama, randomize, batch):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["LORA"]()))
    basis = random_basis(model)
    with lens.watch_gradients(model, basis=basis) as expected:
        model(**batch).loss.backward()
    with lens.watch_gradients(model, basis=basis) as parts:
        for i in range(3):
            (model(**{key: value[i : i + 1] for key, value in batch.items()}).loss / 3).backward()
    model.to(torch.bfloat16)
    with lens.watch_gradients(model, basis=basis) as half:
        model(**batch).loss.backward()
    assert expected.overlaps.keys() == parts.overlaps.keys() == half.overlaps.keys()
    for name, one in expected.overlaps.items():
        assert parts.overlaps[name].kappa == pytest.approx(one.kappa, rel=1e-3)
        assert half.overlaps[name].kappa == pytest.approx(one.kappa, rel=0.2)


def test_watching_in_a_basis_forms_no_gradient(tiny_llama, randomize, batch):
    """No tensor of d_out × d_in numbers is made beyond those of the passes themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "mm" in str(function):
                self.shapes.append(tuple(result.shape))
            return result

    model = randomize(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["down_proj"])))
    seen = []
    for basis in (None, random_basis(model)):
        with Products() as products:
            if basis is None:
                model(**batch).loss.backward()
            else:
                with lens.watch_gradients(model, basis=basis):
                    model(**batch).loss.backward()
        seen.append(products.shapes)
    layer = next(iter(layers_of(model).values()))
    added = list(seen[1])
    for shape in seen[0]:
        added.remove(shape)
    assert added
    assert (layer.out_features, layer.in_features) not in added
    assert all(min(shape[-2:]) <= 3 + 8 for shape in added)


def small_trainer(model, tmp_path, callback, **options):
    ids = torch.randint(1, 64, (8, 8), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    callback.attach(trainer)
    return trainer


@pytest.mark.slow
def test_the_callback_writes_which_basis_and_trains_as_without(tiny_llama, tmp_path, batch):
    sketch = pilot.gradient_subspaces(tiny_llama(), [batch], num_batches=1, rank=4, progress=False)
    trained = []
    for basis in (None, sketch):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
        callback = SpectralCallback(every=1, basis=basis)
        small_trainer(model, tmp_path, callback).train()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    found = Trajectory.read(tmp_path / "run")
    assert found == callback.trajectory
    label = "gradient subspaces of rank 4 (1 batch, seed 0)"
    assert [one.kappa_basis for one in found.snapshots] == [None, label, label]  # step 0 has no gradient
    assert found.snapshots[1].total.kappa > found.snapshots[1].total.kappa_chance > 0
    assert found.kappa_bases == (label,)
    assert f"κ in {label}" in found.details
    assert found.plot().axes[2].get_title() == "Gradient in given subspaces"
    report = training_report(tmp_path / "run")
    assert report.runs[0].kappa_basis == report.rows()[0]["kappa_basis"] == label
    assert f"κ in {label}" in report.details
    (tmp_path / "run" / "spectra.jsonl").rename(tmp_path / "given.jsonl")
    whole = Trajectory.read(tmp_path / "run" / "spectra-1.jsonl")
    assert whole.kappa_bases == (None,)
    assert whole.plot().axes[2].get_title() == "Gradient in the adapter's subspaces"
    both = Trajectory((*found.snapshots, *whole.snapshots))
    assert both.plot().axes[2].get_title() == "Gradient in different subspaces"


@pytest.mark.parametrize(("kappa", "said"), [(0.011, True), (0.5, False)])
def test_advice_near_chance_is_about_the_basis(tmp_path, kappa, said):
    total = {"name": "all", "modules": 2, "effective_rank": 1.0, "stable_rank": 1.0, "capacity_utilization": 0.5}
    total |= {"kappa": kappa, "kappa_chance": 0.01}
    line = {"step": 5, "modules": [], "roles": [], "total": total, "qv_gap": None, "unmeasured": []}
    (tmp_path / "spectra.jsonl").write_text(json.dumps({**line, "kappa_basis": "given subspaces of dimension 3"}))
    (run,) = training_report(tmp_path).runs
    assert any("left the given subspaces" in one for one in run.advice) == said


# what is refused


Q, V = (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qv")


def changed(basis, **changes):
    return {**basis, **{{"q": Q, "v": V}[name]: pair for name, pair in changes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {name: pair for name, pair in b.items() if name != V}, f"1 of 4 are missing: {V}"),
        (lambda b: {**b, "model.other": b[Q]}, "none of the name model.other"),
        (lambda b: changed(b, v=b[Q]), rf"`basis` of '{V}' must have U with 16 rows .* got 32 and 32"),
    ],
)
def test_a_basis_that_does_not_fit_stops_training_before_it_starts(tiny_llama, tmp_path, change, message):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    basis = change(random_basis(model))
    trainer = small_trainer(model, tmp_path, SpectralCallback(basis=basis))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "run" / "spectra.jsonl").exists()
    with pytest.raises(ValueError, match=message), lens.watch_gradients(model, basis=basis):
        pass
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: changed(b, q=(2 * b[Q][0], b[Q][1])), ValueError, f"orthonormal columns: UᵀU of '{Q}' is 3 off"),
        (lambda b: changed(b, q=(b[Q][0], math.nan * b[Q][1])), ValueError, f"VᵀV of '{Q}' is nan off"),
        (lambda b: changed(b, q=(b[Q][0][:, :1], b[Q][1])), ValueError, f"`basis` of '{Q}' must be real matrices"),
        (lambda b: changed(b, q=(b[Q][0][:, :0], b[Q][1][:, :0])), ValueError, "must be real matrices"),
        (lambda b: changed(b, q=(b[Q][0].int(), b[Q][1].int())), ValueError, "torch.int32"),
        (lambda b: changed(b, q=b[Q][0]), TypeError, f"pairs of tensors .* got Tensor for '{Q}'"),
        (lambda b: {3: b[Q]}, TypeError, "for 3"),
        (lambda b: {}, ValueError, "at least one module"),
        (lambda b: b[Q], TypeError, "names to pairs"),
        (lambda b: "gradient", TypeError, "got str"),
    ],
)
def test_what_is_no_basis(tiny_llama, change, error, message):
    basis = change(random_basis(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))))
    with pytest.raises(error, match=message):
        SpectralCallback(basis=basis)


def test_a_basis_needs_gradients():
    with pytest.raises(ValueError, match="`basis` is for κ, which needs `gradients=True`"):
        SpectralCallback(basis={"0": (torch.eye(2), torch.eye(2))}, gradients=False)
