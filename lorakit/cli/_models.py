"""How commands load a model: the options that all of them have."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit import evaluation

Base = Annotated[str, typer.Option(help="The base model: a path or Hub id, with its tokenizer.")]
Device = Annotated[
    str | None,
    typer.Option(help="Default: an accelerator where there is one.", show_default=False),
]
Dtype = Annotated[str, typer.Option(help="Dtype of the model, such as bfloat16; auto: as it is stored.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in 4 bits (bitsandbytes).")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the Hub.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")]


def load_options(
    device: str | None, dtype: str, load_in_4bit: bool, revision: str | None, trust_remote_code: bool
) -> evaluation.LoadOptions:
    """The options as `lorakit.evaluation` takes them. Raises: EvaluationError."""
    return evaluation.LoadOptions(
        device=device,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
