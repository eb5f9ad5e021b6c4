"""Examples as batches: which rows, cut to which length, and what became of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from tqdm.auto import tqdm

from lorakit._checks import check_integer
from lorakit._format import visible
from lorakit._report import Report
from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.data._formats import Encoded, Encoder, resolve_columns
from lorakit.data._sources import is_source, name_of, read
from lorakit.data._tokenizer import tokenizer_for
from lorakit.errors import DataError

if TYPE_CHECKING:
    import datasets

Batch = dict[str, Tensor]


@dataclass(frozen=True, repr=False)
class DataReport(Report):
    """What became of a source's rows: how many are examples, and how many were cut or dropped."""

    source: str
    length: int
    num_rows: int  # of the source
    num_read: int  # those that `start` and `num_examples` chose
    num_examples: int
    num_dropped: int  # without a label that a causal model can be trained on
    num_prompts_cut: int  # lost tokens before the answer
    num_answers_cut: int  # lost the answer's end; a text is all answer
    num_prompts_changed: int  # tokenized differently once the answer follows
    num_tokens: int
    num_labels: int
    eos_token: str | None

    @property
    def headline(self) -> str:
        return (
            f"{self.num_examples} examples from {self.num_read} of {self.num_rows} rows of {self.source}, "
            f"{self.num_tokens} tokens, {self.num_labels} with a label"
        )

    @property
    def details(self) -> tuple[str, ...]:
        lines = {
            f"{self.num_dropped} dropped: they have no label": self.num_dropped,
            f"{self.num_prompts_cut} lost the beginning of the prompt at `length` {self.length}": self.num_prompts_cut,
            f"{self.num_answers_cut} lost the end of the answer at `length` {self.length}": self.num_answers_cut,
            f"{self.num_prompts_changed} prompts end in tokens that change once the answer follows; end them on a "
            f"token's boundary": self.num_prompts_changed,
            "the tokenizer has no EOS token, so that nothing ends texts and completions": self.eos_token is None,
        }
        return tuple(line for line, said in lines.items() if said)


class ExampleLoader(DataLoader[Batch]):
    """A torch DataLoader of batches padded on the right; `report` says what became of the rows."""

    def __init__(self, examples: Sequence[Batch], batch_size: int, pad_token_id: int, report: DataReport) -> None:
        super().__init__(examples, batch_size=batch_size, collate_fn=_Padding(pad_token_id))  # type: ignore[arg-type]
        self.report = report

    def by_length(self) -> tuple[DataLoader[Batch], list[int]]:
        """The same examples, the longest first, which saves padding; and the place of each in this loader's order."""
        examples: Any = self.dataset
        places = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
        batches = BatchSampler(places, self.batch_size or 1, drop_last=False)
        return DataLoader(examples, batch_sampler=batches, collate_fn=self.collate_fn), places


@dataclass(frozen=True)
class _Padding:
    """Collates examples; a class, so that workers of a DataLoader can be sent it."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Batch]) -> Batch:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        return {
            name: nn.utils.rnn.pad_sequence([example[name] for example in examples], True, value)
            for name, value in fill.items()
        }


def loader(
    source: str | os.PathLike[str] | datasets.Dataset | datasets.DatasetDict,
    tokenizer: Any,
    *,
    length: int = 512,
    batch_size: int = 8,
    num_examples: int | None = None,
    shuffle_seed: int | None = None,
    start: int = 0,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    assistant_only: bool | None = None,
    progress: bool = True,
) -> ExampleLoader:
    """Examples tokenized as TRL's SFTTrainer does, in batches of `input_ids`, `attention_mask`, `labels` (n, length).

    `source` is a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file (paragraphs), a Dataset, or the id of
    one on the Hub, of which `split` ("train") is read, and `subset` where it has several. Its columns are `text`;
    `prompt` and `completion`, both strings or both messages; or `messages`; `columns` gives other names, as in
    ``{"text": "sentence"}``. Texts and completions end with the EOS token. Labels are all of a text, the completion
    after a prompt, and of a chat what the template marks by ``{% generation %}`` (all of it where the template marks
    nothing): TRL's defaults, and for chats its `assistant_only_loss` wherever that works. `assistant_only` says always
    or never.

    The rows used are those from `start` on, `num_examples` of them (default: all), in the source's order or in
    ``numpy.random.default_rng(shuffle_seed).permutation``: ranges that do not overlap share no row, whatever tokenizer
    or `length`. Examples of more than `length` tokens lose the beginning of what precedes the last answer, and the end
    of the answer only where it is too long by itself; a BOS token stays. TRL cuts one end whatever is there. Examples
    without a label after their first token are left out. `loader.report` counts all of it.

    Raises: DataError for data that cannot be read, rows of no format, and where no example has a label; OSError for a
    file that is not there; ValueError for the other arguments.

    Example:
        >>> from lorakit.data import loader
        >>> for batch in loader("train.jsonl", tokenizer, length=512):  # doctest: +SKIP
        ...     loss = model(**batch).loss
    """
    check_integer("length", length, least=2)
    check_integer("batch_size", batch_size)
    name = name_of(source)
    rows = read(source, split, subset)
    fields = resolve_columns(rows.column_names, columns, name)
    order = row_order(len(rows), start, num_examples, shuffle_seed)
    encoder = Encoder(tokenizer, assistant_only)
    used = rows.select_columns(list(dict.fromkeys(fields.values()))).select(order)
    bar = tqdm(used, desc=f"tokenizing {visible(name)}", unit="row", disable=not progress, delay=1.0)
    encoded = [
        encoder({field: row[column] for field, column in fields.items()}, f"Row {number + 1} of {name}")
        for number, row in zip(order, bar, strict=True)
    ]
    examples, report = _cut_all(encoded, tokenizer, name, len(rows), length)
    return ExampleLoader(examples, batch_size, _pad_token_id(tokenizer), report)


def as_loader(source: Any, tokenizer: Any = None, **options: Any) -> Iterable[Any]:
    """What yields batches: `source` itself, if it does, or the `loader` of a path, dataset id or Dataset.

    `tokenizer` may be a model: its tokenizer is then the one beside the path or Hub id that it was loaded from; or the
    path or Hub id of an adapter or a model, which has a tokenizer beside it.
    Raises: as `loader`; DataError for a model that does not say where it was loaded from; TypeError for anything else
    that is not iterable, and for `options` with batches, which are made already.
    """
    if is_source(source):
        if tokenizer is None:
            raise DataError("`tokenizer` must be given with a path, a dataset id or a Dataset; got None.")
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = tokenizer_for(tokenizer)
        return loader(source, _tokenizer_of(tokenizer) if isinstance(tokenizer, nn.Module) else tokenizer, **options)
    if not isinstance(source, Iterable):
        raise TypeError(f"`source` must yield batches, or be a path, id or Dataset; got {type(source).__name__}.")
    if options:
        raise TypeError(f"{', '.join(f'`{name}`' for name in options)} cannot be applied to batches, only to a source.")
    return source


def examples_for(
    model: nn.Module, source: Any, tokenizer: Any = None, *, num_examples: int | None = None, progress: bool = True
) -> Iterable[Any]:
    """What a function that takes a loader or a source of examples iterates: see `as_loader`.

    A path or Hub id as `tokenizer` is one beside which the tokenizer lies, such as the adapter's; the model's own base
    is then what has the rest. Without a `tokenizer`, it is the one that the model was saved with. Rows of a source
    beyond `num_examples` are not read.
    """
    if not is_source(source):
        if tokenizer is not None:
            raise TypeError("`tokenizer` is for a path, a dataset id or a Dataset; these batches are tokens already.")
        return as_loader(source)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = tokenizer_for(tokenizer, _loaded_from(model) or None)
    chosen = model if tokenizer is None else tokenizer
    return as_loader(source, chosen, num_examples=num_examples, progress=progress)


def _loaded_from(model: nn.Module) -> str:
    """The path or Hub id that a model was loaded from; "" where it does not say."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _tokenizer_of(model: nn.Module) -> Any:
    name = _loaded_from(model)
    if not name:
        raise DataError("This model does not say where it was loaded from. Pass its `tokenizer`, or a loader.")
    return tokenizer_for(name)


def row_order(num_rows: int, start: int, num_examples: int | None, shuffle_seed: int | None) -> list[int]:
    """The places of the rows used, from `start` on. Raises: DataError, ValueError."""
    check_integer("start", start, least=0)
    if num_examples is not None:
        check_integer("num_examples", num_examples)
    if shuffle_seed is not None:
        check_integer("shuffle_seed", shuffle_seed, least=0)
    if start >= num_rows:
        raise DataError(f"`start` must be below the number of rows, {num_rows}; got {start}.")
    order = range(num_rows) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(num_rows)
    return [int(i) for i in order[start : None if num_examples is None else start + num_examples]]


def _pad_token_id(tokenizer: Any) -> int:
    """As TRL has it: the pad token, or else EOS; padding is masked, so that 0 will do where there is neither."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def _cut_all(
    encoded: Sequence[Encoded], tokenizer: Any, name: str, num_rows: int, length: int
) -> tuple[list[Batch], DataReport]:
    examples = []
    prompts_cut = answers_cut = dropped_by_cutting = 0
    for one in encoded:
        ids, labels, prompt_cut, answer_cut = cut(one, length, tokenizer.bos_token_id)
        if not _has_label(labels):
            dropped_by_cutting += _has_label(one.labels)
            continue
        prompts_cut += prompt_cut
        answers_cut += answer_cut
        examples.append(
            {
                "input_ids": torch.tensor(ids),
                "attention_mask": torch.ones(len(ids), dtype=torch.long),
                "labels": torch.tensor(labels),
            }
        )
    if not examples:
        raise DataError(f"None of the {len(encoded)} rows read of {name} has a label: {_way_out(dropped_by_cutting)}")
    report = DataReport(
        source=name,
        length=length,
        num_rows=num_rows,
        num_read=len(encoded),
        num_examples=len(examples),
        num_dropped=len(encoded) - len(examples),
        num_prompts_cut=prompts_cut,
        num_answers_cut=answers_cut,
        num_prompts_changed=sum(not one.prompt_kept for one in encoded),
        num_tokens=sum(len(example["input_ids"]) for example in examples),
        num_labels=sum(int((example["labels"] != IGNORED_LABEL).sum()) for example in examples),
        eos_token=tokenizer.eos_token,
    )
    return examples, report


def _way_out(dropped_by_cutting: int) -> str:
    if dropped_by_cutting:
        return f"{dropped_by_cutting} lost all of theirs when they were cut. Raise `length`."
    return (
        "their texts or completions are empty, or the chat template marks nothing that the assistant says. Give "
        "answers to learn, or `assistant_only=False`."
    )


def _has_label(labels: Sequence[int]) -> bool:
    """Whether a causal model's loss has a term: the first token is predicted from nothing."""
    return any(label != IGNORED_LABEL for label in labels[1:])


def cut(example: Encoded, length: int, bos_token_id: int | None) -> tuple[list[int], list[int], bool, bool]:
    """The tokens and labels that remain of `length`, and whether the prompt and whether the answer lost some.

    The prompt loses its first tokens after BOS, which many models cannot do without; then the answer its last ones.
    """
    ids, labels = example.input_ids, example.labels
    excess = len(ids) - length
    if excess <= 0:
        return ids, labels, False, False
    head = int(ids[0] == bos_token_id)
    gap = min(excess, max(0, example.answer_start - head))
    ids, labels = ids[:head] + ids[head + gap :], labels[:head] + labels[head + gap :]
    if head and gap:
        labels[head] = IGNORED_LABEL  # BOS does not predict what now stands after it
    return ids[:length], labels[:length], gap > 0, excess > gap
