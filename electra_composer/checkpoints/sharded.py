"""Read sharded checkpoints (`trainer.fsdp.state_dict_type: sharded`) in one process, without running code in them.

A sharded checkpoint is a folder with one file per rank and a pickled table of contents, `.metadata`.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from electra_composer.checkpoints.file_kinds import EXPECTED
from electra_composer.checkpoints.safe_loading import (
    METADATA,
    SafeLoadPlanner,
    SafeReader,
    cause_of,
    dcp_warnings_ignored,
    describe_objects,
)
from electra_composer.errors import UserError, one_line


def is_sharded(path: str) -> bool:
    """Whether a path is the folder of a sharded checkpoint."""
    return os.path.isfile(os.path.join(path, METADATA))


PARTS = (("model",), ("timestamp",), ("callbacks", "RunRecord"))


def read_sharded(folder: str) -> dict[str, Any]:
    """Read the state of a sharded checkpoint as far as exports need it, in Composer's layout.

    Returns:
        `model`, `timestamp`, and of `callbacks` only `RunRecord`; nothing of the optimizer.

    Raises:
        UserError: Not a checkpoint of pretrain.py, incomplete, or readable by unsafe loading only.
    """
    state: dict[str, Any] = _read(folder, [("state", *path) for path in PARTS])["state"]
    return state


def read_all(folder: str) -> dict[str, Any]:
    """Read a complete sharded checkpoint in the layout of Composer's single file: `state`, `rng`.

    Raises:
        UserError: As in :func:`read_sharded`.
    """
    return _read(folder, [()])


def _read(folder: str, prefixes: list[tuple[str, ...]]) -> dict[str, Any]:
    """Read the parts of a sharded checkpoint's tree below `prefixes`."""
    try:
        reader = SafeReader(folder)
        metadata = reader.read_metadata()
        paths = {
            name: path
            for name, path in metadata.planner_data.items()
            if any(path[: len(prefix)] == prefix for prefix in prefixes)
        }
        values = {name: _placeholder(metadata.state_dict_metadata[name]) for name in paths}
        with dcp_warnings_ignored():
            dcp.load(values, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=True)
        tree: dict[Any, Any] = {"state": {}}
        for name, value in values.items():
            _insert(tree, paths[name], value)
        return _with_lists(tree)
    except (Exception, CheckpointException) as error:  # torch raises many classes for arbitrary bytes
        cause = cause_of(error)
        objects = describe_objects(cause)
        if objects is not None:
            raise UserError(f"{folder}: {objects}; {EXPECTED}") from error
        raise UserError(
            f"{folder}: a sharded checkpoint of which files are missing or damaged{_describe(cause)}; {EXPECTED}"
        ) from error


def _describe(cause: BaseException) -> str:
    if isinstance(cause, FileNotFoundError) and cause.filename is not None:
        return f" (there is no {os.path.basename(cause.filename)})"
    if isinstance(cause, pickle.UnpicklingError | EOFError):
        return f" ({METADATA} cannot be read)"
    return f" ({one_line(cause, 100)})"


def _placeholder(description: Any) -> torch.Tensor | None:
    """Return what `dcp.load` needs for an entry: a tensor to fill, or None for a plain value."""
    if isinstance(description, TensorStorageMetadata):
        return torch.empty(description.size, dtype=description.properties.dtype)
    return None


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(tree: Any) -> Any:
    """Convert dictionaries with the keys 0, 1, … back to the lists that torch flattened."""
    if not isinstance(tree, dict):
        return tree
    parts = {key: _with_lists(value) for key, value in tree.items()}
    if parts and all(isinstance(key, int) for key in parts) and sorted(parts) == list(range(len(parts))):
        return [parts[index] for index in range(len(parts))]
    return parts
