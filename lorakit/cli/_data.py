"""Target modules and examples as the shell names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorakit.data import ExampleLoader

DATA_HELP = (
    "Examples: a .jsonl, .json, .csv, .parquet or .txt file, or the id of a dataset, with `text`, or `prompt` and "
    "`completion`, or `messages`."
)
Length = Annotated[int, typer.Option(min=2, help="Tokens of an example; longer ones lose the prompt's beginning.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples a batch; the result does not depend on it.")]
NumExamples = Annotated[int, typer.Option(min=1, help="Rows to use.")]
Start = Annotated[int, typer.Option(min=0, help="The first row to use, counted from 0, after shuffling.")]
ShuffleSeed = Annotated[
    int | None, typer.Option(min=0, help="Shuffle the rows by this seed; default: the file's order.")
]
Columns = Annotated[
    str | None, typer.Option(help="The columns to read, as prompt=question,completion=answer; or text=…, messages=….")
]
Split = Annotated[str | None, typer.Option(help="The split of a dataset id.", show_default="train")]


def named_targets(text: str | None) -> str | list[str] | None:
    """Target modules as the shell has them: names with commas between, "all-linear", or None."""
    if text is None or text == "all-linear":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def read_examples(data: str, tokenizer: Any, columns: str | None, **options: Any) -> ExampleLoader:
    """`lorakit.data.loader`, with columns as the shell has them."""
    from lorakit.data import loader

    return loader(data, tokenizer, columns=named_columns(columns), **options)


def named_columns(text: str | None) -> dict[str, str] | None:
    """The columns as the shell has them: FIELD=COLUMN with commas between, or None."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(field.strip() and column.strip() for field, _, column in pairs):
        raise typer.BadParameter("must be FIELD=COLUMN with commas between.", param_hint="--columns")
    return {field.strip(): column.strip() for field, _, column in pairs}
