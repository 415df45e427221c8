"""Cache of tokenized files, addressed by content.

The name of a cache file is a hash of everything that its content depends on: it is never out of date, and may be
deleted at any time. Processes that write the same file write the same content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.atomic_files import replaced_file
from electra_composer.errors import UserError

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
# Parts of a tokenizer's state that calls change. post_processor: we add special tokens ourselves.
PER_CALL = ("truncation", "padding", "post_processor")


def cache_file(folder: str, name: str, settings: dict[str, Any]) -> str:
    """Return the path of the cache file for `settings`: `folder/name-<hash of settings>.npz`.

    Args:
        settings: everything that the arrays depend on, as JSON values.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return os.path.join(folder, f"{name}-{digest[:24]}.npz")


def read_cache(file: str, names: set[str]) -> Arrays | None:
    """Read the arrays of a cache file; None if it does not exist or, with a warning, if it is corrupt.

    Args:
        names: arrays that must exist; others may.
    """
    if not os.path.exists(file):
        return None
    try:
        with np.load(file, allow_pickle=False) as content:  # reading compares the archive's checksums
            arrays = {name: content[name] for name in content.files}
        if missing := names - arrays.keys():
            raise KeyError(f"no array {min(missing)}")
        return arrays
    except Exception as error:  # a corrupt archive raises many kinds of errors
        log.warning("%s: not a readable cache file (%s: %s); recreating it", file, type(error).__name__, error)
        return None


def write_cache(file: str, arrays: Arrays) -> None:
    """Write a cache file atomically.

    If the file cannot be written, for example on a full disk, only warn: the run does not need it.

    Raises:
        UserError: the folder cannot be created.
    """
    folder = os.path.dirname(file)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache {folder}: cannot create this folder ({error.strerror}); set another one, or null for no cache"
        ) from error
    try:
        with replaced_file(file) as stream:
            np.savez(stream, **arrays)
    except OSError as error:
        log.warning("data.cache %s: not written (%s); the next run tokenizes again", file, error.strerror)


def file_sha256(file: str) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of a tokenizer: vocabulary, normalization, splitting, and the ids of `[CLS]` and `[SEP]`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {name: value for name, value in state.items() if name not in PER_CALL}
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()
