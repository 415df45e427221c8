"""Find the files of a split, and recognize their format by name and content."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from typing import Any

from electra_composer.corpus.files import COMPRESSIONS
from electra_composer.errors import UserError
from electra_composer.tasks.conll import looks_like_conll
from electra_composer.tasks.formats import AUTO, FORMATS
from electra_composer.tasks.texts import read_pieces

# Formats by suffix. Those of `json`, `jsonl`, and of any other suffix, such as `.txt`, depend on the content.
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    **dict.fromkeys((".conll", ".conllu", ".conllx", ".conllup", ".conll2003", ".conll03"), "conll"),
    **dict.fromkeys((".iob", ".iob1", ".iob2", ".bio", ".bioes", ".iobes", ".bilou", ".ner"), "conll"),
}
_SUFFIXES_OF = {"squad": ("json",), "mrqa": ("jsonl", "json")}  # formats of :data:`SUFFIXES`; others are their own
_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("dev", "val", "valid", "validation"), "validation")}
_BEGIN = 1 << 20  # bytes of a file that are looked at


def find_table_files(key: str, source: str, format: str = AUTO) -> tuple[str, list[str]]:
    """Find the files of a path, a folder (not those below it) or a glob, and their format.

    Args:
        key: of the configuration, for messages.
        format: one of :data:`FORMATS`, or `auto`.

    Returns:
        The format, and the files in the order of their names.

    Raises:
        UserError: no files, files of several formats or, in a folder, of several splits; an unknown format.
    """
    if format not in (AUTO, *FORMATS):
        raise UserError(f"data.format {format}: unknown; expected {AUTO}, {', '.join(FORMATS)}")
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        found = _files_in(key, path, format)
    else:
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise UserError(f"{key} {source}: no such file or folder, and no file matches it as a glob; check the path")
    if format != AUTO:
        if os.path.isdir(path):
            _check_splits(key, path, found)
        return format, found
    formats = {file: format_of(file) for file in found}
    if os.path.isdir(path):  # texts such as README.txt may lie beside the data
        formats = {file: kind for file, kind in formats.items() if kind} or formats
        _check_splits(key, path, list(formats))
    return _one_format(key, source, formats), list(formats)


def _files_in(key: str, folder: str, format: str) -> list[str]:
    """Return the files of a folder but for hidden ones, and for others than those of the format if it has any."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith((".", "_")))  # _SUCCESS of Spark
    found = [file for name in names if os.path.isfile(file := os.path.join(folder, name))]
    if not found:
        raise UserError(f"{key} {folder}: the folder has no files; expected files of one format in it")
    wanted = _SUFFIXES_OF.get(format, (format,))
    return [file for file in found if format != AUTO and _format_by_suffix(file) in wanted] or found


def _check_splits(key: str, folder: str, files: list[str]) -> None:
    """Refuse a folder with `train.csv` and `test.csv`: all of its files would be one split."""
    splits: dict[str, str] = {}
    for name in map(os.path.basename, files):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _SPLITS:
                splits.setdefault(_SPLITS[word], name)
    if len(splits) > 1:
        raise UserError(
            f"{key} {folder}: files of several splits: {', '.join(splits.values())}; expected one: give the file, or a "
            f"glob such as {os.path.join(folder, '*train*')}"
        )


def _one_format(key: str, source: str, formats: dict[str, str | None]) -> str:
    first = {kind: file for file, kind in reversed(formats.items())}  # of each format
    file = next(iter(formats))
    if None in first:
        raise UserError(
            f"{first[None]}: the format cannot be told by its name; expected {_suffixes()}, or a CoNLL file with blank "
            f"lines between sentences: rename it, or set data.format to one of {', '.join(FORMATS)}"
        )
    if len(first) > 1:
        shown = ", ".join(f"{kind} ({os.path.basename(path)})" for kind, path in first.items())
        raise UserError(
            f"{key} {source}: files of several formats: {shown}; expected one: give a glob such as "
            f"{os.path.join(os.path.dirname(file), '*' + os.path.splitext(file)[1])}"
        )
    return next(kind for kind in first if kind)


def format_of(path: str) -> str | None:
    """Return the format of a file, by its name and, where that does not tell, by its begin; None if it is unknown.

    Raises:
        UserError: a file that has to be looked at cannot be read, or is JSON of another layout.
    """
    kind = _format_by_suffix(path)
    if kind in ("json", "jsonl"):
        return _json_format(path, next(read_pieces(path, _BEGIN), ""), kind)
    if kind is None:
        with contextlib.suppress(UserError):  # it may be anything, such as an image
            return "conll" if looks_like_conll(next(read_pieces(path, _BEGIN), "")) else None
    return kind


def _json_format(path: str, begin: str, kind: str) -> str:
    """Tell apart JSON Lines, MRQA's lines, an array, and SQuAD's layout."""
    begin = begin.lstrip()
    first = _parse(begin.partition("\n")[0])
    if isinstance(first, dict):
        if _is_mrqa(first):
            return "mrqa"
        data = first.get("data")
        return "squad" if isinstance(data, list) and data and _has(data[0], "paragraphs") else "jsonl"
    if kind == "jsonl" or not begin.startswith(("[", "{")):
        return kind
    if begin.startswith("["):
        return "json"
    if re.search(r'"data"\s*:\s*\[', begin) and re.search(r'"(paragraphs|title)"\s*:', begin):
        return "squad"
    if "\n" not in begin:  # the first line is longer than what was looked at
        return "jsonl"
    raise UserError(
        f"{path}: one JSON object of an unknown layout; expected an array of objects, an object a line, or SQuAD's "
        "layout (data[].paragraphs[].qas[]): convert it, with pandas by to_json(orient='records', lines=True)"
    )


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # a part of a longer value, or broken: the reader says where
        return None


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _is_mrqa(first: dict[str, Any]) -> bool:
    return first.keys() == {"header"} or {"context", "qas"} <= first.keys()


def _format_by_suffix(path: str) -> str | None:
    return SUFFIXES.get(os.path.splitext(_name(path))[1].lower())


def _name(path: str) -> str:
    """Return the name of a file without the suffix of its compression. Parquet has a compression of its own."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    return stem if suffix.lower() in COMPRESSIONS and not stem.endswith(".parquet") else stem + suffix


def _suffixes() -> str:
    short = [suffix for suffix, kind in SUFFIXES.items() if kind != "conll"]
    return f"{', '.join(short)} (all but .parquet also with {' or '.join(COMPRESSIONS)})"
