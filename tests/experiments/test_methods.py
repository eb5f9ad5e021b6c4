"""Every PEFT method is trained as it needs, or refused by name."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import trials
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig, experiments
from lorakit.errors import TrialError, UnsupportedModelError
from lorakit.experiments import _methods

T = {"task_type": "CAUSAL_LM"}
L = {"target_modules": ["q_proj", "v_proj"], **T}
SETTINGS = {"batch_size": 5, "learning_rate": 1e-2, "progress": False, "seeds": (0,)}

# A config of every method, small enough for the tiny model, and what its batches need besides.
METHODS = {
    "LORA": ("LoraConfig", L, {}),
    "ADALORA": ("AdaLoraConfig", {"target_r": 2, "init_r": 4, "total_step": 1, **L}, {}),
    "ADAMSS": ("AdamssConfig", L, {}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2, **T}, {}),
    "BEFT": ("BeftConfig", L, {}),
    "BOFT": ("BOFTConfig", L, {}),
    "C3A": ("C3AConfig", {"block_size": 16, **L}, {}),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 4, **T}, {}),
    "CPT": (
        "CPTConfig",
        {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3], **T},
        {"input_type_mask": torch.tensor([1, 1, 2, 3, 4, 4])},
    ),
    "DEFT": ("DeftConfig", L, {}),
    "DELORA": ("DeloraConfig", L, {}),
    "FISHERLORA": (FisherLoRAConfig, {"r": 4, "r_q": 2}, {}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 50, **L}, {}),
    "FROD": ("FrodConfig", L, {}),
    "GLORA": ("GloraConfig", L, {}),
    "GRALORA": ("GraloraConfig", L, {}),
    "HIRA": ("HiraConfig", L, {}),
    "HRA": ("HRAConfig", L, {}),
    "IA3": ("IA3Config", {"feedforward_modules": [], **L}, {}),
    "LILY": ("LilyConfig", L, {}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm"], **T}, {}),
    "LOHA": ("LoHaConfig", L, {}),
    "LOKR": ("LoKrConfig", L, {}),
    "MISS": ("MissConfig", {"r": 4, **L}, {}),
    "MULTITASK_PROMPT_TUNING": (
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 4, "num_tasks": 2, **T},
        {"task_ids": torch.tensor(0)},
    ),
    "OFT": ("OFTConfig", L, {}),
    "OSF": ("OSFConfig", L, {}),
    "PEANUT": ("PeanutConfig", L, {}),
    "POLY": ("PolyConfig", {"n_tasks": 2, **L}, {"task_ids": torch.tensor(0)}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 4, **T}, {}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 4, **T}, {}),
    "PSOFT": ("PsoftConfig", {"r": 4, **L}, {}),
    "PVERA": ("PveraConfig", L, {}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 4, **T}, {}),
    "RANDLORA": ("RandLoraConfig", L, {}),
    "ROAD": ("RoadConfig", {"group_size": 4, **L}, {}),
    "SHADOW": ("ShadowConfig", T, {}),
    "SHIRA": ("ShiraConfig", {"r": 2, **L}, {}),
    "SPECLORA": (SpecLoRAConfig, {"r": 2, "k": 5, **L}, {}),
    "SUPERTUNING": ("SuperTuningConfig", L, {}),
    "TINYLORA": ("TinyLoraConfig", L, {}),
    "TRAINABLE_TOKENS": (
        "TrainableTokensConfig",
        {"token_indices": list(range(1, 40)), "target_modules": ["embed_tokens"], **T},
        {},
    ),
    "UNILORA": ("UniLoraConfig", L, {}),
    "VBLORA": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 16, **L}, {}),
    "VERA": ("VeraConfig", L, {}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 50, **L}, {}),
}
REFUSED = {"XLORA"}


def config_of(method):
    cls, arguments, extra = METHODS[method]
    if isinstance(cls, str):
        cls = next((value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items() if key == method), None)
        if cls is None:
            pytest.skip(f"PEFT {peft.__version__} has no {method}")
    return cls(**copy.deepcopy(arguments)), extra


def training_loss(data, extra):
    """The loss of the examples that were trained on, so that it falls in a few steps."""

    def evaluate(model):
        extras = {key: torch.stack([value] * len(data)) for key, value in extra.items()}
        extras = extras if hasattr(model, "peft_config") else {}
        rows = {key: torch.stack([example[key] for example in data]) for key in ("input_ids", "labels")}
        return float(model(**rows, **extras).loss)

    return evaluate


def test_the_table_has_every_method_of_peft():
    known = {str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known <= METHODS.keys() | REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_base_is_restored(method, data):
    config, extra = config_of(method)
    model = trials.tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = [example | extra for example in data]
    losses = [  # PEFT adds AdaLoRA's orthogonality term to the loss, so both have an adapter
        experiments.rank_sweep(
            model, {"one": config}, examples, training_loss(data, extra), steps=steps, schedule="constant",
            **SETTINGS | {"learning_rate": rate},
        ).ranks[0].loss.value
        for steps, rate in ((2, 1e-12), (25, 1e-2))
    ]  # fmt: skip
    assert losses[1] < losses[0] - 1e-3
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", ["CPT", "POLY", "MULTITASK_PROMPT_TUNING"])
def test_methods_that_need_more_in_each_batch(method, data):
    config, extra = config_of(method)
    with pytest.raises(
        TrialError, match=f"{method} needs `{next(iter(extra))}` in each batch: let `collate_fn` add it"
    ):
        experiments.rank_sweep(trials.tiny_model(), {"one": config}, data, training_loss(data, {}), steps=2, **SETTINGS)


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (
            lambda: peft.AdamssConfig(use_asa=True, **L),
            40,
            "as ADAMSS needs: its `final_warmup` 1000 is after the last of",
        ),
        (lambda: LoraConfig(init_lora_weights="eva", **L), 40, "as LORA needs: PEFT initializes EVA from data after"),
        (
            lambda: peft.XLoraConfig(hidden_size=32, adapters={"a": "a/"}, **T),
            40,
            "as XLORA needs: it mixes adapters that are already trained",
        ),
        (
            lambda: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=1, **L),
            40,
            "'one': `init_r` of AdaLoRA must be above `target_r`, or there is nothing to remove; got 4 and 4",
        ),
        (
            lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=1, **L),
            1,
            r"'one': `tinit` \+ `tfinal` of AdaLoRA must be below `steps`; got 0 \+ 0 and 1 steps",
        ),
        (
            lambda: peft.AdaLoraConfig(tinit=20, tfinal=20, total_step=100, **L),
            40,
            r"'one': `tinit` \+ `tfinal` of AdaLoRA must be below `steps`; got 20 \+ 20 and 40 steps. Leave both at 0",
        ),
    ],
)
def test_what_the_loop_would_train_as_something_else_is_refused(make, steps, message, data):
    with pytest.raises(UnsupportedModelError, match=message):
        experiments.rank_sweep(trials.tiny_model(), {"one": make()}, data, trials.held_out, steps=steps, **SETTINGS)


def test_a_train_of_ones_own_may_initialize_eva(data):
    config = LoraConfig(init_lora_weights="eva", **L)
    found = experiments.rank_sweep(
        trials.tiny_model(), {"one": config}, data, trials.held_out, steps=2, train=lambda *_: None, **SETTINGS
    )
    assert found.ranks[0].loss.value == found.base.value


def test_lora_ga_needs_its_gradients(data):
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **L)
    with pytest.raises(TrialError, match="LoRA-GA is initialized from gradients .* call PEFT's `preprocess_loraga`"):
        experiments.rank_sweep(trials.tiny_model(), {"one": config}, data, trials.held_out, steps=2, **SETTINGS)


def test_a_config_with_nothing_to_train_is_refused(data):
    config = LoraConfig(inference_mode=True, **L)
    with pytest.raises(TrialError, match="one with seed 0 has no parameters to train: check its config"):
        experiments.rank_sweep(trials.tiny_model(), {"one": config}, data, trials.held_out, steps=2, **SETTINGS)


def adalora_by_hand(model, data, steps, tinit, tfinal):
    """AdaLoRA as PEFT's documentation trains it; the losses of `held_out`, and each module's rank afterwards."""
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=steps, tinit=tinit, tfinal=tfinal, **L)
    torch.manual_seed(3)
    adapted = get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(data, num_samples=5 * steps, generator=generator)
    loader = torch.utils.data.DataLoader(data, 5, sampler=sampler, generator=generator)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    warmup = 2
    for step, batch in enumerate(loader):
        rate = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        adapted(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        adapted.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    ranks = [int((m.lora_E["default"] != 0).sum()) for m in adapted.modules() if hasattr(m, "lora_E")]
    sizes = [sum(m.get_base_layer().weight.shape) + 1 for m in adapted.modules() if hasattr(m, "lora_E")]
    with torch.no_grad():
        losses = trials.held_out(adapted.eval())
    return losses.tolist(), ranks, sum(r * size for r, size in zip(ranks, sizes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("tinit", "tfinal", "used"), [(0, 0, (4, 20)), (3, 7, (3, 7)), (5, 0, (5, 0))])
def test_adalora_against_a_plain_loop(tinit, tfinal, used, data):
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=1000, tinit=tinit, tfinal=tfinal, **L)
    found = experiments.rank_sweep(
        trials.tiny_model(), {"one": config}, data, trials.held_out, steps=40, schedule="linear", warmup_steps=2,
        **SETTINGS | {"seeds": (3,)},
    )  # fmt: skip
    losses, ranks, params = adalora_by_hand(trials.tiny_model(), data, 40, *used)
    assert sum(ranks) == 3 * 4  # of 6 · 4 at first
    (run,) = found.runs
    assert run.losses == pytest.approx(losses, rel=1e-5)
    assert run.params == params
    assert (config.total_step, config.tinit) == (1000, tinit)  # the caller's config stays as it is


def test_removed_parameters_without_a_schedule(data):
    """A `train` that never reallocates keeps all directions, and they are counted."""
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, **L)
    found = experiments.rank_sweep(
        trials.tiny_model(), {"one": config}, data, trials.held_out, steps=4, train=lambda *_: None, **SETTINGS
    )
    assert found.runs[0].params == 6 * 2 * ((32 + 32 + 1) + (32 + 16 + 1))


@pytest.mark.parametrize(
    ("field", "make"),
    [("kasa_config", "KasaConfig"), ("monteclora_config", "MontecloraConfig")],
)
def test_terms_of_the_loss_that_peft_leaves_to_the_loop(field, make, data):
    module = __import__("peft.tuners.lora.config", fromlist=[make])
    if not hasattr(module, make):
        pytest.skip(f"PEFT {peft.__version__} has no {make}")
    config = LoraConfig(r=4, **L, **{field: getattr(module, make)()})
    model = get_peft_model(trials.tiny_model(), config)
    batch = {key: torch.stack([example[key] for example in data]) for key in ("input_ids", "labels")}
    loss = model(**batch).loss
    term = getattr(model.base_model, f"_get_{field.removesuffix('_config')}_loss")()
    assert float(term) != 0
    assert float(_methods.loss_terms(model, config, loss)) == pytest.approx(float(loss + term), rel=1e-6)
    plain = LoraConfig(r=4, **L)
    assert _methods.loss_terms(model, plain, loss) is loss


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0, 0.5, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("constant", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule, expected, data, monkeypatch):
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    found = experiments.rank_sweep(
        trials.tiny_model(), {"one": LoraConfig(**L)}, data, trials.held_out, steps=6, warmup_steps=2,
        schedule=schedule, **SETTINGS,
    )  # fmt: skip
    assert rates == pytest.approx([1e-2 * rate for rate in expected], rel=1e-9)
    assert found.settings["schedule"] == schedule
