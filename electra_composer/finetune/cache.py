"""Tokenized files, kept on disk and found again by content.

A cache file is named after everything that its content depends on, so that none is ever out of date, and any may be
deleted at any time. Processes need not agree: each writes aside and renames, and two write the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
PER_CALL = ("truncation", "padding", "post_processor")  # of a tokenizer's state: what its callers set, not what it is


def cache_file(folder: str, name: str, settings: dict[str, Any]) -> str:
    """Where the arrays of `settings` are, or will be: `folder/name-<hash of settings>.npz`.

    Args:
        settings: JSON values; everything that the arrays depend on.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return os.path.join(folder, f"{name}-{digest[:24]}.npz")


def read_cache(file: str, names: set[str]) -> Arrays | None:
    """The arrays of a cache file; None where there is none, or, with a warning, none that can be read.

    Args:
        names: of the arrays that must be there; others may be.
    """
    if not os.path.exists(file):
        return None
    try:
        with np.load(file, allow_pickle=False) as content:  # the archive's checksums are compared on reading
            arrays = {name: content[name] for name in content.files}
        if missing := names - arrays.keys():
            raise KeyError(f"no array {min(missing)}")
        return arrays
    except Exception as error:  # there is no end to the kinds that a broken archive raises
        log.warning("%s: not a readable cache file (%s: %s); it is made anew", file, type(error).__name__, error)
        return None


def write_cache(file: str, arrays: Arrays) -> None:
    """Write beside the file's place, then rename: nobody sees half of it.

    A disk that is full costs the time that the cache would have saved, not the run: it is warned of.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = os.path.dirname(file)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache {folder}: no folder, and none can be made ({error.strerror}); give another, or null"
        ) from error
    aside = f"{file}.{uuid.uuid4().hex}.tmp"
    try:
        with open(aside, "wb") as stream:
            np.savez(stream, **arrays)
        os.replace(aside, file)
    except OSError as error:
        log.warning("data.cache %s: not written (%s); the file is tokenized anew next time", file, error.strerror)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def file_sha256(file: str) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of a tokenizer: vocabulary, normalization, splitting and the special tokens of an example."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {name: value for name, value in state.items() if name not in PER_CALL}
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()
