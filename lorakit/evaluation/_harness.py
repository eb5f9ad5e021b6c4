"""Running a task of lm-evaluation-harness on a model in memory, one score a document.

The choices of one question share its keys and values on a CPU: the question is read once, not once a choice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lorakit.errors import EvaluationError, MissingExtraError
from lorakit.evaluation._digests import digest
from lorakit.statistics._corpus_metrics import CORPUS_METRICS

_SHORTEST_SHARED = 8  # tokens: below this a second forward pass costs more than reading the question again


@dataclass(frozen=True)
class HarnessResult:
    """Hashes of documents with their prompts, their scores, and what the harness did.

    With a corpus metric (`metric`) `scores` are predicted classes, and `labels` the true ones.
    """

    documents: list[str]
    scores: list[float]
    settings: dict[str, Any]
    metric: str | None = None
    labels: list[float] | None = None


def import_harness() -> Any:
    """The package lm_eval. Raises: MissingExtraError where it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise MissingExtraError(
            "This task runs on lm-evaluation-harness, which is not installed: pip install 'lorakit[eval]'"
        ) from error
    return lm_eval


def run_task(
    task: str | dict[str, Any],
    metric: str | None,
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    progress: bool = True,
) -> HarnessResult:
    """The scores of `task`'s documents, in the harness' order.

    Args:
        task: a name that the harness knows, the path of a YAML config, or a config as a dict.
        metric: which of the task's metrics is the score; None: the first that each document has.
        limit: how many documents at most.
        progress: show the harness' progress bars, on stderr.
    Raises: EvaluationError where the harness fails, or the metric is not one of the task's.
    """
    import_harness()
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    batch_size = 8 if model.device.type == "cpu" else "auto"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with _output(progress):
            results = evaluator.simple_evaluate(
                model=_language_model(model, tokenizer, batch_size, progress),
                tasks=[task],
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                num_fewshot=num_fewshot,
                apply_chat_template=chat_template,
                task_manager=TaskManager(),
            )
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise EvaluationError(f"lm-evaluation-harness cannot run {task!r}: {type(error).__name__}: {error}") from error
    found = _result(results, metric)
    return replace(found, settings={**found.settings, "chat_template": chat_template})


@contextlib.contextmanager
def _output(progress: bool) -> Iterator[None]:
    """What the harness prints goes to stderr; without `progress` it and `datasets` show no progress bars."""
    import datasets
    from lm_eval.api import task

    bars, shown = task.tqdm, not datasets.are_progress_bars_disabled()
    try:
        if not progress:
            task.tqdm = functools.partial(tqdm, disable=True)  # the harness has no option for this bar
            datasets.disable_progress_bars()
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        task.tqdm = bars
        if shown:
            datasets.enable_progress_bars()


def _result(results: Any, metric: str | None) -> HarnessResult:
    samples = [sample for found in results["samples"].values() for sample in found]
    if not samples:
        raise EvaluationError("The task has no document.")
    first_filter = samples[0].get("filter")
    samples = [sample for sample in samples if sample.get("filter") == first_filter]
    metrics = list(samples[0]["metrics"])
    metric = metrics[0] if metric is None else metric
    if metric not in metrics:
        raise EvaluationError(f"`metric` must be one of the task's, {', '.join(metrics)}; got {metric!r}.")
    documents = [_document(sample) for sample in samples]
    settings = {
        "harness": str(results.get("lm_eval_version", "")),
        "metric": metric,
        "filter": first_filter,
        "versions": {name: str(version) for name, version in results["versions"].items()},
        "num_fewshot": dict(results["n-shot"]),
        "decoding": [_decoding(config) for config in results["configs"].values()],
    }
    values = [sample[metric] for sample in samples]
    if metric in CORPUS_METRICS and all(isinstance(value, list | tuple) and len(value) == 2 for value in values):
        labels, predictions = (_numbers(metric, metrics, side) for side in zip(*values, strict=True))
        return HarnessResult(documents, predictions, settings, metric, labels)
    scores = _numbers(metric, metrics, values)
    lower_is_better = {name: not up for found in results["higher_is_better"].values() for name, up in found.items()}
    if lower_is_better.get(metric):
        scores = [-score for score in scores]
    return HarnessResult(documents, scores, settings)


def _document(sample: Any) -> str:
    parts = (sample["doc_hash"], sample["prompt_hash"], sample["target_hash"])
    return hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()


def _decoding(config: Any) -> dict[str, Any]:
    """How a task's answers are had: the kind of request, and what ends and draws a generation."""
    kind = str(config.get("output_type", ""))
    kwargs = config.get("generation_kwargs") if kind == "generate_until" else None
    return {"output_type": kind, "generation_kwargs": None if kwargs is None else digest(str(sorted(kwargs.items())))}


def _numbers(metric: str, metrics: Sequence[str], values: Sequence[Any]) -> list[float]:
    found = []
    for value in values:
        try:
            found.append(float(value))
        except (TypeError, ValueError) as error:
            raise EvaluationError(
                f"The metric {metric!r} is not one number a document ({value!r}). Name another as `metric`: "
                f"{', '.join(metrics)}."
            ) from error
    return found


def _language_model(model: Any, tokenizer: Any, batch_size: int | str, progress: bool) -> Any:
    """The harness' wrapper of a model, whose progress bars can be left out."""

    class LM(_shared_prefix_class()):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or not progress)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm or not progress)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found: list[str] = super().generate_until(requests, disable_tqdm or not progress)
            return found

    return LM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _shared_prefix_class() -> Any:
    """A language model of the harness' whose choices share their question's keys and values."""
    from lm_eval.models.huggingface import HFLM

    class SharedPrefixLM(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool] | None] = [None] * len(requests)
            groups: dict[tuple[int, ...], list[int]] = {}
            for i, (_, context, _) in enumerate(requests):
                groups.setdefault(tuple(context), []).append(i)
            rest = []
            for context, members in tqdm(groups.items(), desc="Running requests by question", disable=disable_tqdm):
                longest = max(len(requests[i][2]) for i in members)
                if not self._shares(context, members, longest):
                    rest += members
                    continue
                found = _shared_loglikelihoods(self.model, self.device, context, [requests[i][2] for i in members])
                for i, answer in zip(members, found, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
            others = (
                super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm, override_bs) if rest else []
            )
            for i, answer in zip(rest, others, strict=True):
                answers[i] = answer
            return [answer for answer in answers if answer is not None]

        def _shares(self, context: tuple[int, ...], members: list[int], longest: int) -> bool:
            """Whether reading the question once pays: several long questions a batch are faster on an accelerator."""
            fits = len(context) + longest <= self.max_length
            cached = self.backend == "causal" and getattr(self.model.config, "use_cache", False) is not None
            on_cpu = self.device.type == "cpu"
            return on_cpu and cached and fits and len(members) > 1 and len(context) >= _SHORTEST_SHARED

    return SharedPrefixLM


@torch.no_grad()
def _shared_loglikelihoods(
    model: Any, device: torch.device, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Of each continuation: the sum of its tokens' log-probabilities, and whether it is what greedy decoding gives."""
    prefix = torch.tensor([list(context)], device=device)
    out = model(input_ids=prefix, use_cache=True)
    logits = out.logits[:, -1:].expand(len(continuations), -1, -1)
    width = max(map(len, continuations))
    padded = torch.tensor([list(c) + [0] * (width - len(c)) for c in continuations], device=device)
    if width > 1:
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(continuations))
        inputs = padded[:, :-1]
        mask = torch.ones(len(continuations), len(context) + width - 1, device=device, dtype=torch.long)
        more = model(input_ids=inputs, past_key_values=cache, attention_mask=mask, use_cache=True).logits
        logits = torch.cat([logits, more], dim=1)
    logits = F.log_softmax(logits.float(), dim=-1)
    return [_answer(row[: len(c)], c) for row, c in zip(logits, continuations, strict=True)]


def _answer(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    tokens = torch.tensor(list(continuation), device=logits.device)
    chosen = logits.gather(1, tokens.unsqueeze(1)).sum()
    return float(chosen), bool((logits.argmax(-1) == tokens).all())
