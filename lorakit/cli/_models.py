"""Loading a base model with an adapter, for commands that need both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from peft import PeftModel

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_adapted(base: str, adapter: str) -> PeftModel:
    """The adapter in its base model, in the dtypes they are stored in.

    The class is that of the adapter's `task_type`, or else the one that the base model was saved with.
    Raises: OSError and ValueError for what cannot be loaded.
    """
    import transformers
    from peft import PeftModel

    from lorakit.adapters import open_adapter

    task = open_adapter(adapter).settings.raw.get("task_type")
    name = _AUTO_CLASSES.get(str(task))
    if name is None:
        config = transformers.AutoConfig.from_pretrained(base)
        name = (config.architectures or [""])[0]
        if not hasattr(transformers, name):
            raise UnsupportedModelError(f"{base!r} does not say which class it is of; load it in Python instead.")
    model = getattr(transformers, name).from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter)
