"""Examples from files, tokenized into batches with labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.errors import CalibrationError

Batch = dict[str, Tensor]
Chat = list[dict[str, str]]
Example = tuple[str, str] | Chat


def read_examples(path: Path, at_most: int) -> list[Example]:
    """The first examples of a file, each a prompt (may be empty) and the text that is learned, or a chat.

    ``.jsonl``: an object a line, with `text`, with `prompt` and `completion`, or with `messages`, a list of objects
    with `role` and `content`. ``.txt``: paragraphs, with blank lines between.
    Raises: OSError, and CalibrationError for another suffix, a line that is none of these, or no example at all.
    """
    found: list[Example] = []
    if path.suffix == ".txt":
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        found += [("", paragraph.strip()) for paragraph in paragraphs if paragraph.strip()][:at_most]
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_example(line, f"{path}, line {number}"))
                if len(found) == at_most:
                    break
    else:
        raise CalibrationError(f"The examples must be a .jsonl or a .txt file; got {str(path)!r}.")
    if not found:
        raise CalibrationError(f"{str(path)!r} has no example.")
    return found


def _example(line: str, place: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{place} is no JSON: {error}.") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if messages and isinstance(messages, list) and all(map(_is_message, messages)):
        return messages
    for keys in (("text",), ("prompt", "completion")):
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys):
            return ("", row["text"]) if keys == ("text",) else (row["prompt"], row["completion"])
    got = f"the keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(
        f"{place} must be an object with the string `text`, or `prompt` and `completion`, or a list of "
        f"`messages`; got {got}."
    )


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _tokens(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """The tokens that are given and those that are learned: of a chat its last message, if the assistant says it."""
    if isinstance(example, tuple):
        prompt, text = example
        given = tokenizer(prompt)["input_ids"] if prompt else []
        return given, tokenizer(text, add_special_tokens=not prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise CalibrationError("The tokenizer has no chat template, which `messages` need; give `text` instead.")
    whole = tokenizer.apply_chat_template(example, tokenize=False)
    before = ""
    if example[-1]["role"] == "assistant" and len(example) > 1:
        before = tokenizer.apply_chat_template(example[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(before):
        raise CalibrationError("The chat template does not put the last message after the others; give `text` instead.")
    given = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
    return given, tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]


def make_batches(tokenizer: Any, examples: Sequence[Example], length: int, batch_size: int) -> list[Batch]:
    """Examples as batches padded on the right, cut off at `length` tokens; labels are what follows the prompt."""
    encoded = []
    for example in examples:
        before, learned = _tokens(tokenizer, example)
        ids = (before + learned)[:length]
        encoded.append((ids, [IGNORED_LABEL] * len(before[:length]) + ids[len(before) :]))
    batches = []
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        width = max(len(ids) for ids, _ in part)
        rows = [(ids, labels, width - len(ids)) for ids, labels in part]
        batches.append(
            {
                "input_ids": torch.tensor([ids + [0] * pad for ids, _, pad in rows], dtype=torch.long),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * pad for ids, _, pad in rows]),
                "labels": torch.tensor([labels + [IGNORED_LABEL] * pad for _, labels, pad in rows]),
            }
        )
    return batches
