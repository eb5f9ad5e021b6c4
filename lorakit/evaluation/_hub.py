"""An adapter on the Hub with its certificate."""

from __future__ import annotations

import os
from pathlib import Path

from lorakit.adapters.atomic import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, replaced_directory
from lorakit.adapters.companions import CARD_NAME, CERTIFICATE_NAME, COMPANIONS, without_certificate
from lorakit.adapters.edit_log import RECORD_NAME
from lorakit.errors import EvaluationError
from lorakit.evaluation._certificate import Certificate, read_certificate

_FILES = (WEIGHTS_NAME, PICKLE_NAME, CONFIG_NAME, CARD_NAME, CERTIFICATE_NAME, RECORD_NAME, *COMPANIONS)


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    certificate: Certificate | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload an adapter's directory to the Hub, with its certificate and the certificate's section of the model card.

    Weights, config, model card, certificate, record of surgery, tokenizer and chat template are uploaded; other files,
    such as checkpoints of a training, are not. (`PeftModel.push_to_hub` saves the adapter anew, without them.)

    Args:
        directory: the adapter's.
        repo_id: such as "me/adapter"; made if need be.
        certificate: None: the one beside the adapter. One that is given is first written beside the adapter and into
            its model card.
        private, token, revision, commit_message: as in `huggingface_hub`.
    Returns: the commit's address.
    Raises: EvaluationError, and nothing is uploaded, where there is no certificate, where it does not verify, or where
        it is of another adapter than the one in `directory`; `huggingface_hub`'s errors.
    """
    folder = Path(directory)
    if certificate is None and not (folder / CERTIFICATE_NAME).is_file():
        raise EvaluationError(
            f"There is no certificate beside the adapter in {os.fspath(directory)!r}. Pass `certificate`, or write the "
            f"adapter by `lorakit.evaluation.write_certified`."
        )
    own = read_certificate(folder) if certificate is None else certificate
    own.verify()
    own.check_candidate(folder)
    _put_beside(folder, own)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        revision=revision,
        commit_message=commit_message or f"Adapter with its certificate: {own.verdict}",
        allow_patterns=[*_FILES, "additional_chat_templates/*"],
    )
    return str(getattr(done, "commit_url", done))


def _put_beside(folder: Path, certificate: Certificate) -> None:
    """Write certificate and section of the card, unless they are there."""
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    wanted = without_certificate(text) + "\n" + certificate.to_model_card()
    beside = folder / CERTIFICATE_NAME
    if text.strip() == wanted.strip() and beside.is_file() and beside.read_text("utf-8") == certificate.to_json():
        return
    with replaced_directory(folder) as new:
        certificate.save(new / CERTIFICATE_NAME)
        (new / CARD_NAME).write_text(wanted, encoding="utf-8")
