"""Examples from files, datasets and dataset ids, read by the `datasets` library."""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._signals import restoring
from lorakit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_SMALL = 1 << 20
_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_source(value: object) -> bool:
    """Whether `value` is something that examples are read from, and not already a loader."""
    if isinstance(value, str | os.PathLike):
        return True
    return any(f"{cls.__module__}.{cls.__name__}".startswith("datasets.") for cls in type(value).__mro__)


def name_of(source: object) -> str:
    """The source as reports and messages name it."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"


def read(source: str | os.PathLike[str] | Dataset, split: str | None = None, subset: str | None = None) -> Dataset:
    """The rows of a file, a `datasets.Dataset`, one split of a `DatasetDict`, or of a dataset on the Hub.

    `subset` names one of several parts that a dataset on the Hub has, such as "cola" of GLUE. A file is read without
    the network, and nothing of it stays in a cache. A string is a dataset id if it is not the path of something that
    exists, does not end like a file, and has the form of an id.
    Raises: DataError for what cannot be read or has no row; OSError for a file that is not there.
    """
    import datasets

    if subset is not None and not _is_dataset_id(source):
        raise DataError(f"`subset` is for a dataset id; got {subset!r} with {name_of(source)}.")
    if isinstance(source, datasets.DatasetDict):
        source = source[_split_among(list(source), split)]
    elif split is not None and (isinstance(source, datasets.Dataset) or not _is_dataset_id(source)):
        raise DataError(f"`split` is for a dataset id or a DatasetDict; got {split!r} with {name_of(source)}.")
    if isinstance(source, datasets.Dataset):
        rows = source.with_format(None)
    elif not isinstance(source, str | os.PathLike):
        raise DataError(
            f"`source` must be a path, a dataset id, or a datasets.Dataset; got {type(source).__name__}. Other rows "
            f"become one by `datasets.Dataset.from_list(rows)`."
        )
    else:
        rows = _from_hub(os.fspath(source), split, subset) if _is_dataset_id(source) else _from_file(Path(source))
    if len(rows) == 0:
        raise DataError(f"{name_of(source)!r} has no example.")
    return rows


def _is_dataset_id(source: Any) -> bool:
    if not isinstance(source, str) or os.path.exists(source):
        return False
    return Path(source).suffix.lower() not in _KINDS and _DATASET_ID.fullmatch(source) is not None


def _split_among(names: list[str], split: str | None) -> str:
    wanted = "train" if split is None else split
    if wanted not in names:
        raise DataError(f"`split` must be one of {', '.join(map(str, names))}; got {wanted!r}.")
    return wanted


def _from_hub(name: str, split: str | None, subset: str | None) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split or "train")
    except Exception as error:
        raise DataError(
            f"{name!r} is no file here, and split {split or 'train'!r} of a dataset of this id cannot be fetched: "
            f"{_first_line(error)}. Check path, id, split and connection, or pass the Dataset that "
            f"`datasets.load_dataset` gives."
        ) from error


def _from_file(path: Path) -> Dataset:
    kind = _KINDS.get(path.suffix.lower())
    if path.is_dir() or kind is None:
        what = "is a directory" if path.is_dir() else f"ends in {path.suffix!r}"
        if not path.exists():
            raise FileNotFoundError(f"No such file: {str(path)!r}, nor can it be the id of a dataset.")
        raise DataError(
            f"`source` must be a file that ends in {', '.join(_KINDS)}; {str(path)!r} {what}. Pass what "
            f"`datasets.load_dataset` or `load_from_disk` makes of it."
        )
    with path.open("rb"):  # what the system says of a file that is missing or may not be read
        pass
    try:
        if kind != "parquet" and path.stat().st_size < _SMALL and not path.read_bytes().strip(b"\xef\xbb\xbf \t\r\n"):
            raise DataError(f"{str(path)!r} has no example: the file is empty.")
        if kind == "json":
            _check_json(path)
        return _loaded(path, kind)
    except DataError:
        raise
    except Exception as error:
        raise DataError(_reason(path, kind, error)) from error


def _reason(path: Path, kind: str, error: Exception) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"{str(path)!r} must be UTF-8; got the byte {cause.object[cause.start]:#x}. Convert the file."
    if "corresponds to no data" in str(cause):  # what `datasets` says of a table without rows
        return f"{str(path)!r} has no example."
    if "cast" in str(cause):
        return f"{str(path)!r}: its later rows have other columns or types than the first. Give all rows the same ones."
    return f"{str(path)!r} cannot be read as {kind}: {_first_line(cause)}."


def _loaded(path: Path, kind: str) -> Dataset:
    import datasets

    options: dict[str, Any] = {}
    if kind == "csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file))
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name in {names}")
        # Every value is text: an answer "1" is no number, and an answer "None" is not missing.
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options = {"features": features, "keep_default_na": False, "na_filter": False, "index_col": False}
        options["encoding"] = "utf-8-sig"
    if kind == "text":
        options = {"sample_by": "paragraph"}
    with tempfile.TemporaryDirectory() as directory, _quiet(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Length of header or names")
        link = Path(directory, f"data{path.suffix}")  # `datasets` would take some characters of the name as a pattern
        link.symlink_to(path.resolve())
        rows = datasets.load_dataset(
            kind, data_files=str(link), split="train", cache_dir=directory, keep_in_memory=True, **options
        )
    if kind == "text":
        paragraphs = (text.strip() for text in rows["text"])
        rows = datasets.Dataset.from_dict({"text": [text for text in paragraphs if text]})
    return rows


@restoring
def _quiet() -> Iterator[None]:
    """Neither progress bars nor messages of `datasets`, which says the same again in its exceptions."""
    import datasets

    shown, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()


def _check_json(path: Path) -> None:
    """Raise DataError, with the line, for a file that is no JSON, or whose examples are no objects.

    `datasets` does not say which line it is, and its parser may crash on one that is nested too deep.
    """
    if path.suffix.lower() == ".json":
        text = path.read_text(encoding="utf-8-sig")
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not _is_object(text.lstrip().split("\n", 1)[0]):  # JSON lines otherwise
                raise DataError(f"{str(path)!r} is no JSON: {_first_line(error)}.") from error
        else:
            for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
                _check_object(row, f"{path}, example {number}")
            return
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is no JSON: {_first_line(error)}.") from error
            _check_object(row, f"{path}, line {number}")


def _check_object(row: object, place: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{place} must be an object; got {type(row).__name__}.")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
