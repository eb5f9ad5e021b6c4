"""Healing: an adapter that was cut learns from the original's predictions for a few steps, on texts without labels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm

from lorakit._checks import check_integer, check_number, check_seed
from lorakit._signals import all_of
from lorakit.adapters.atomic import WEIGHTS_NAME
from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.calibration.state import no_inference_mode, preserved_state
from lorakit.errors import EvaluationError
from lorakit.evaluation._agreement import Prompts, log_probabilities
from lorakit.evaluation._attach import AttachedAdapter
from lorakit.evaluation._digests import document_hashes

_BATCH_SIZE = 8
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Healed:
    """What the steps did: KL(original ‖ cut) in nats a token, means over the first and the last tenth of the steps.

    Each is of the batch of its step, before the step; so `kl_before` is that of the cut adapter only if the steps are
    few.
    """

    steps: int
    learning_rate: float
    kl_before: float
    kl_after: float


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """How long, how strongly and on texts of which length an adapter is healed."""

    steps: int
    learning_rate: float
    length: int
    seed: int

    def __post_init__(self) -> None:
        """Raises: TypeError, ValueError."""
        check_integer("heal_steps", self.steps)
        check_number("heal_learning_rate", self.learning_rate, above=0)
        check_integer("heal_length", self.length, least=2)
        check_seed("heal_seed", self.seed)


@dataclass(frozen=True, eq=False)
class Healing:
    """How adapters are healed: the original, the texts, and how many steps of which size; all checked."""

    original: AttachedAdapter
    batches: Sequence[Mapping[str, Tensor]]
    settings: HealSettings
    progress: bool

    @property
    def documents(self) -> list[str]:
        """The hashes of the texts, which no verdict may rest on."""
        return document_hashes(self.batches)

    def heal(self, base: nn.Module, directory: str | os.PathLike[str]) -> Healed:
        """Train the factors of the adapter in `directory` towards the original's predictions, and write them there.

        All is as it was, also the base model, but for the weights in `directory`, which keep their names and dtypes.
        Raises: EvaluationError where the loss is not finite.
        """
        losses: list[float] = []
        with AttachedAdapter(base, directory).applied() as model:
            with no_inference_mode(), torch.enable_grad(), all_of(map(preserved_state, (model, self.original.model))):
                model.eval()  # as they are served: no dropout
                self.original.model.eval()
                parameters = _only_factors(model)
                optimizer = AdamW(parameters, lr=self.settings.learning_rate, weight_decay=0.0)
                schedule = CosineAnnealingLR(optimizer, self.settings.steps)
                bar = tqdm(
                    self._order(), total=self.settings.steps, desc="healing", disable=not self.progress, delay=1.0
                )
                for batch in bar:
                    loss = self._loss(model, batch)
                    losses.append(loss.item())
                    if not math.isfinite(losses[-1]):
                        raise EvaluationError(
                            f"The loss of healing is not finite after {len(losses) - 1} steps. Lower the learning "
                            f"rate, {self.settings.learning_rate:g}."
                        )
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    schedule.step()
            _write(model, Path(directory, WEIGHTS_NAME))
        part = max(1, self.settings.steps // 10)
        first, last = losses[:part], losses[-part:]
        settings = self.settings
        return Healed(settings.steps, settings.learning_rate, sum(first) / len(first), sum(last) / len(last))

    def _order(self) -> Iterator[Mapping[str, Tensor]]:
        """Batches, each once in a new order before any comes again."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        left: list[int] = []
        for _ in range(self.settings.steps):
            left = left or torch.randperm(len(self.batches), generator=generator).tolist()
            yield self.batches[left.pop()]

    def _loss(self, cut: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """KL(original ‖ cut), the mean over the tokens that have a label."""
        with torch.no_grad():
            wanted = torch.cat(log_probabilities(self.original.applied, batch))
        found = torch.cat(log_probabilities(lambda: nullcontext(cut), batch))
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def prepare(
    base: nn.Module, original: Any, text: Any, tokenizer: Any, settings: HealSettings, *, progress: bool
) -> Healing:
    """Read the texts. Raises: EvaluationError, DataError, TypeError."""
    if text is None:
        raise EvaluationError("`heal_text` is needed with `heal_steps`: texts like those that the adapter will see.")
    read = Prompts(text, settings.length, _BATCH_SIZE, None, {}).batches(tokenizer, progress=progress)
    batches = [batch for batch in read if bool((batch["labels"][:, 1:] != IGNORED_LABEL).any())]
    if not batches:
        raise EvaluationError("`heal_text` has no token that a model could predict.")
    return Healing(AttachedAdapter(base, original), batches, settings, progress)


def _only_factors(model: nn.Module) -> list[nn.Parameter]:
    """Make the adapter's factors trainable, and nothing else."""
    found = []
    for name, parameter in model.named_parameters():
        trained = any(part in _FACTORS for part in name.split("."))
        parameter.requires_grad_(trained)
        if trained:
            found.append(parameter)
    return found


def _write(model: Any, path: Path) -> None:
    """The adapter's factors in the place of those in a file, in its dtypes."""
    stored = load_file(path)
    trained = get_peft_model_state_dict(model)
    changed = {key: trained[key].detach().to(stored[key].dtype).cpu().contiguous() for key in stored if key in trained}
    save_file(stored | changed, path, metadata={"format": "pt"})
