"""Rows of the formats that TRL's SFTTrainer takes, as tokens and labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.errors import DataError

# In the order in which they are looked for.
FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))
_BESIDE = ("tools", "chat_template_kwargs")
_RENAMED = {"from": "role", "value": "content"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One example's tokens, uncut; the answer is what must not be lost where it is cut."""

    input_ids: list[int]
    labels: list[int]
    answer_start: int
    prompt_kept: bool = True  # False where the prompt's last tokens differ once the answer follows


def resolve_columns(present: Sequence[str], columns: Mapping[str, str] | None, source: str) -> dict[str, str]:
    """The columns to read, by the name that their format has for them.

    Raises: DataError where `columns` does not name the fields of one format, and where columns are missing.
    """
    known = " or ".join(" and ".join(f"`{name}`" for name in names) for names in FORMATS)
    if columns is None:
        fields = {name for names in FORMATS if set(names) <= set(present) for name in names}
        if not fields:
            raise DataError(
                f"The rows of {source} must have the columns {known}; they have {_listed(present)}. Name the columns "
                f'meant, as in `columns={{"prompt": "question", "completion": "answer"}}`.'
            )
        return {name: name for name in (*sorted(fields), *_BESIDE) if name in present}
    if set(columns) not in [set(names) for names in FORMATS]:
        raise DataError(f"`columns` must give columns for {known}; got {_listed(list(columns))}.")
    missing = [column for column in columns.values() if column not in present]
    if missing:
        raise DataError(f"`columns` names {_listed(missing)}, which {source} does not have: {_listed(present)}.")
    return dict(columns) | {name: name for name in _BESIDE if name in present}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


class Encoder:
    """Tokens and labels of rows, as TRL's SFTTrainer has them before it cuts them."""

    def __init__(self, tokenizer: Any, assistant_only: bool | None) -> None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only
        self.marks_answers = template is not None and _GENERATION.search(template) is not None
        if assistant_only and not self.marks_answers:
            raise DataError(
                "`assistant_only=True` needs a chat template with `{% generation %}` around what the assistant says; "
                "this tokenizer's has none. Set `tokenizer.chat_template`, for known models to what "
                "`trl.chat_template_utils.get_training_chat_template(tokenizer)` gives."
            )

    def __call__(self, row: Mapping[str, Any], place: str) -> Encoded:
        """Raises: DataError, with `place`, for a row of no format and for values of another type."""
        row = {name: value for name, value in row.items() if value is not None}
        names = next((names for names in FORMATS if set(names) <= set(row)), None)
        if names is None:
            given = [name for name in row if name not in _BESIDE]
            raise DataError(
                f"{place} must have `text`, or `prompt` and `completion`, or `messages`; got {_listed(given)}. Leave "
                f"out rows without a value."
            )
        if names == ("text",):
            ids = self._ids(self._ended(_string(row["text"], "text", place)))
            return Encoded(ids, list(ids), answer_start=0)
        options = _template_options(row, place)
        if len(names) == 1:
            return self._chat(_messages(row[names[0]], names[0], place), options, place)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            got = f"{type(prompt).__name__} and {type(completion).__name__}"
            raise DataError(f"{place}: `prompt` and `completion` must both be strings, or both messages; got {got}.")
        if isinstance(prompt, str):
            return _answered(self._ids(prompt), self._ids(prompt + self._ended(completion)))
        prompt, completion = _messages(prompt, "prompt", place), _messages(completion, "completion", place)
        before, _ = self._render(prompt, place, options | {"add_generation_prompt": True})
        ids, mask = self._render(prompt + completion, place, options, masked=self.assistant_only is True)
        return _answered(before, ids, mask)

    def _chat(self, messages: list[dict[str, Any]], options: dict[str, Any], place: str) -> Encoded:
        masked = self.marks_answers if self.assistant_only is None else self.assistant_only
        ids, mask = self._render(messages, place, options, masked=masked)
        if mask is not None:
            labels = [token if said else IGNORED_LABEL for token, said in zip(ids, mask, strict=True)]
            starts = [i for i, said in enumerate(mask) if said and not (i and mask[i - 1])]
            return Encoded(ids, labels, answer_start=starts[-1] if starts else 0)
        start = 0
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            try:
                before, _ = self._render(messages[:-1], place, options | {"add_generation_prompt": True})
                start = _common_prefix(before, ids)
            except DataError:  # the whole can be rendered, this part cannot: its end is cut, as a text's is
                start = 0
        return Encoded(ids, list(ids), answer_start=start)

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        return text if end is None or text.endswith(end) else text + end

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, verbose=False)["input_ids"])

    def _render(
        self, messages: list[dict[str, Any]], place: str, options: dict[str, Any], *, masked: bool = False
    ) -> tuple[list[int], list[int] | None]:
        """The tokens of a chat and, if `masked`, which of them the assistant says."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"{place} is a chat, and the tokenizer has no chat template. Set `tokenizer.chat_template`, or give "
                f"`text`, or `prompt` and `completion` as strings."
            )
        try:
            found = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=masked,
                tokenizer_kwargs={"verbose": False},
                **options,
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise DataError(f"{place}: the chat template does not take these messages: {error}") from error
        return list(found["input_ids"]), list(found["assistant_masks"]) if masked else None


def _answered(prompt: list[int], ids: list[int], mask: list[int] | None = None) -> Encoded:
    """Only what follows the prompt is learned and, of that, only what the mask says.

    The answer begins where the two differ: tokens may merge across the end of the prompt, and a template may render the
    prompt differently once an answer follows.
    """
    start = _common_prefix(prompt, ids)
    said = [i >= start and (mask is None or bool(mask[i])) for i in range(len(ids))]
    labels = [token if learned else IGNORED_LABEL for token, learned in zip(ids, said, strict=True)]
    return Encoded(ids, labels, answer_start=start, prompt_kept=start == len(prompt))


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _string(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: `{name}` must be a string; got {type(value).__name__}.")
    return value


def _messages(value: object, name: str, place: str) -> list[dict[str, Any]]:
    """The messages, with `role` and `content` for `from` and `value`, and without the keys that have no value."""
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{place}: `{name}` must be a list of messages; got {got}.")
    found: list[dict[str, Any]] = []
    for number, message in enumerate(value, 1):
        where = f"{place}: `{name}`, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"{where} must be an object; got {type(message).__name__}.")
        if not isinstance(message.get("role", message.get("from")), str):
            raise DataError(f"{where} must have the string `role`; got {_listed(list(message))}.")
        # `datasets` gives every message the keys of all; templates ask whether a key is there.
        renamed = {_RENAMED.get(str(key), str(key)): item for key, item in message.items()}
        kept = {key: item for key, item in renamed.items() if item is not None or key == "content"}
        content = kept.get("content")
        if not isinstance(content, str | list) and not (content is None and "tool_calls" in kept):
            raise DataError(f"{where} must have the string `content`; got {type(content).__name__}.")
        found.append(kept)
    return found


def _template_options(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    tools, options = row.get("tools"), row.get("chat_template_kwargs", {})
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: `tools` is a string that is no JSON: {error}.") from error
    if not isinstance(options, Mapping):
        raise DataError(f"{place}: `chat_template_kwargs` must be an object; got {type(options).__name__}.")
    return {"tools": tools, **options}
