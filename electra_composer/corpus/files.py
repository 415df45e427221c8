"""Find the files of a source, tell their format by the name, and open them."""

from __future__ import annotations

import glob
import io
import json
import os
from typing import TYPE_CHECKING, Any

from electra_composer.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".csv", ".tsv")
COLUMNAR = (".parquet", ".arrow")  # which have a compression of their own
_FORMATS = (*COLUMNAR, ".jsonl", ".json", *TABLES, ".txt")
_TARS = (".tar", ".tar.xz", ".tar.gz", ".tgz")
# What `save_to_disk` of the library datasets writes into the folder of a Dataset, and of a DatasetDict.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
TRAIN_SPLIT = "train"  # the split that is read unless another is chosen


class UnreadableFile(UserError):
    """A file is truncated, corrupt, or not of the format that its name suggests."""


def find_files(source: str, split: str = TRAIN_SPLIT) -> list[str]:
    """Return the files of a path, a folder (all supported ones below it), a saved data set or a glob, sorted.

    Args:
        split: of a `datasets.DatasetDict` that `save_to_disk` wrote.

    Raises:
        UserError: no files, or not of a supported format; no such split.
    """
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        if format_of(source) is None:
            raise UserError(f"{source}: unknown file format; expected {_formats()}")
        return [source]
    if os.path.isdir(source):
        if has_splits(source):
            source = _split_folder(source, split)
        if os.path.isfile(os.path.join(source, _SAVED)):
            return _saved_files(source)
        found = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    else:
        found = [path for path in glob.glob(source, recursive=True) if os.path.isfile(path)]
        if not found:
            raise UserError(f"{source}: no such file or folder, and no file matches it as a glob; check the path")
    saved = next((path for path in found if os.path.basename(path) in (_SAVED, _SAVED_SPLITS)), None)
    if saved is not None:
        folder = os.path.dirname(saved)
        raise UserError(
            f"{source}: contains {folder}, a data set written by save_to_disk; give it as a --source itself"
        )
    files = sorted(path for path in found if format_of(path))
    if not files:
        raise UserError(f"{source}: contains no file of a supported format; expected {_formats()}")
    return files


def has_splits(source: str) -> bool:
    """Return whether a path is a `datasets.DatasetDict` that `save_to_disk` wrote."""
    return os.path.isfile(os.path.join(os.path.expanduser(source), _SAVED_SPLITS))


def _split_folder(source: str, split: str) -> str:
    splits = _read_json(os.path.join(source, _SAVED_SPLITS)).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise UnreadableFile(f"{source}: {_SAVED_SPLITS} lists no splits; save the data set again")
    if split not in splits:
        raise UserError(
            f"{source}: no split {split!r}; found {', '.join(map(repr, splits))}: choose one with --dataset-split"
        )
    return os.path.join(source, split)


def _saved_files(folder: str) -> list[str]:
    """Return the files of a `datasets.Dataset` that `save_to_disk` wrote, in its order."""
    try:
        names = [file["filename"] for file in _read_json(os.path.join(folder, _SAVED))["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UnreadableFile(f"{folder}: {_SAVED} lists no files; save the data set again") from error
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.isfile(path):
            raise UnreadableFile(f"{path}: no such file, which {_SAVED} beside it lists; copy the complete folder")
    return paths


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path}: cannot be read as JSON: {reason_of(error)}") from error
    return content if isinstance(content, dict) else {}


def _formats() -> str:
    compressed = " or ".join(COMPRESSIONS)
    return (
        f"{', '.join(_FORMATS)} (all but {' and '.join(COLUMNAR)} also with {compressed}), {', '.join(_TARS)} of .txt, "
        "or a folder written by save_to_disk"
    )


def format_of(path: str) -> str | None:
    """Return the format, such as `.jsonl` or `.tar`, by the name of a file; None if it is not supported."""
    name = os.path.basename(path).lower()
    if name.startswith("."):
        return None
    if name.endswith(_TARS):
        return ".tar"
    stem, suffix = os.path.splitext(name)
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in _FORMATS and suffix not in COLUMNAR else None
    return suffix if suffix in _FORMATS else None


def compression_of(path: str) -> str | None:
    return COMPRESSIONS.get(os.path.splitext(path)[1].lower())


def open_lines(path: str, raw: pa.NativeFile | None = None, buffer_size: int = 1 << 20) -> io.BufferedReader:
    """Open a file, plain or compressed, as a stream of lines; a truncated one raises OSError at its end.

    Args:
        raw: the file, if it is open already.
    """
    import pyarrow as pa  # imported here, because a command line that is wrong needs no files

    raw, codec = pa.OSFile(path) if raw is None else raw, compression_of(path)
    return io.BufferedReader(raw if codec is None else pa.CompressedInputStream(raw, codec), buffer_size)


def reason_of(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().split("\n")[0].rstrip(".") or type(error).__name__
