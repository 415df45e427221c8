"""Sharded checkpoints of pretraining (`trainer.fsdp.state_dict_type: sharded`), read whole by one process, and safely.

A folder holds a file per process and a table of contents, `.metadata`. torch.distributed.checkpoint writes that table
as a pickle, and would load it as one, which runs what a stranger has put there. Here it is read by safe_loading.py.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from electra_composer.checkpoints.safe_loading import CONTENTS, SafeContents, load_value
from electra_composer.errors import UserError


def is_sharded(path: str) -> bool:
    """Whether a path is the folder of a sharded checkpoint."""
    return os.path.isfile(os.path.join(path, CONTENTS))


def read_sharded(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The model's weights, and the state of the callback `RunRecord`, of a sharded checkpoint.

    Weights alone: whatever else there is (the optimizer's state) stays unread.

    Raises:
        UserError: not a checkpoint of ours, incomplete, or one that only unsafe loading could read.
    """
    content = _read(folder, [("state", "model"), ("state", "callbacks", "RunRecord")])["state"]
    return content.get("model", {}), content.get("callbacks", {}).get("RunRecord", {})


def read_whole(folder: str) -> dict[str, Any]:
    """All that is in a sharded checkpoint, in the form of Composer's single file: `state`, `rng`.

    Raises:
        UserError: as :func:`read_sharded`.
    """
    return _read(folder, [()])


def _read(folder: str, places: list[tuple[str, ...]]) -> dict[str, Any]:
    """What lies below some of the places of a sharded checkpoint's tree."""
    try:
        reader = _SafeReader(folder)
        contents = reader.read_metadata()
        paths = {
            name: path
            for name, path in contents.planner_data.items()
            if any(path[: len(place)] == place for place in places)
        }
        values: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name in paths:
            if isinstance(contents.state_dict_metadata[name], BytesStorageMetadata):
                values[name] = _read_value(folder, contents, name)
            else:
                tensors[name] = _empty(contents.state_dict_metadata[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is what we want
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        tree: dict[Any, Any] = {"state": {}}
        for name, value in {**values, **tensors}.items():
            _insert(tree, paths[name], value)
        return _with_lists(tree)
    except (Exception, CheckpointException) as error:  # whatever the reader stumbles over; the latter is no Exception
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            raise UserError(
                f"{folder}: holds objects other than tensors and plain values; it was not loaded, since that could "
                f"run code of the files': {str(error).splitlines()[0]}"
            ) from error
        raise UserError(
            f"{folder}: not a readable sharded checkpoint (incomplete, or of another kind?): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


class _SafeReader(SafeContents, dcp.FileSystemReader):
    """torch's reader, but for the table of contents. It loads tensors with `weights_only=True` itself."""


def _empty(description: Any) -> torch.Tensor:
    assert isinstance(description, TensorStorageMetadata), "a weight that is no tensor"
    return torch.empty(description.size, dtype=description.properties.dtype)


def _read_value(folder: str, contents: Metadata, name: str) -> Any:
    """A plain value, which the writer keeps as the bytes of `torch.save`."""
    assert contents.storage_data is not None
    (place,) = (place for index, place in contents.storage_data.items() if index.fqn == name)
    with open(os.path.join(folder, os.path.basename(place.relative_path)), "rb") as file:
        file.seek(place.offset)
        return load_value(io.BytesIO(file.read(place.length)))


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(tree: Any) -> Any:
    """Dictionaries whose keys count from 0 are the lists that the writer took apart."""
    if not isinstance(tree, dict):
        return tree
    parts = {key: _with_lists(value) for key, value in tree.items()}
    if parts and all(isinstance(key, int) for key in parts) and sorted(parts) == list(range(len(parts))):
        return [parts[index] for index in range(len(parts))]
    return parts
