"""Sharded checkpoints of pretraining (`trainer.fsdp.state_dict_type: sharded`), read whole by one process, and safely.

A folder holds a file per process and a table of contents, `.metadata`. torch.distributed.checkpoint writes that table
as a pickle, and would load it as one, which runs what a stranger has put there. Here it is read by an unpickler that
knows the table's own classes and no others; tensors and plain values go through `weights_only=True`.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from electra_composer.errors import UserError

CONTENTS = ".metadata"

# What a table of contents is made of (torch.distributed.checkpoint.metadata, filesystem). None of them runs code.
CONTENT_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}


def is_sharded(path: str) -> bool:
    """Whether a path is the folder of a sharded checkpoint."""
    return os.path.isfile(os.path.join(path, CONTENTS))


def read_sharded(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The model's weights, and the state of the callback `RunRecord`, of a sharded checkpoint.

    Raises:
        UserError: not a checkpoint of ours, incomplete, or one that only unsafe loading could read.
    """
    try:
        reader = _SafeReader(folder)
        contents = reader.read_metadata()
        paths = contents.planner_data
        model = {name: path[-1] for name, path in paths.items() if path[:2] == ("state", "model")}
        tensors = {name: _empty(contents.state_dict_metadata[name]) for name in model}
        record: dict[str, Any] = {}
        for name, path in paths.items():
            if path[:3] == ("state", "callbacks", "RunRecord"):
                _insert(record, path[3:], _read_value(folder, contents, name))
        # Weights alone: whatever else there is (the optimizer's state) stays unread.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is what we want
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # whatever the reader stumbles over in foreign bytes: there is no end of its kinds
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            raise UserError(
                f"{folder}: holds objects other than tensors and plain values; it was not loaded, since that could "
                f"run code of the files': {str(error).splitlines()[0]}"
            ) from error
        raise UserError(
            f"{folder}: not a readable sharded checkpoint (incomplete, or of another kind?): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    return {model[name]: tensor for name, tensor in tensors.items()}, record


class _ContentsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type_of_torch = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        is_size = (module, name) == ("torch", "Size")
        if name in CONTENT_CLASSES.get(module, ()) or is_type_of_torch or is_size:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unsupported class {module}.{name} in {CONTENTS}")


def read_contents(folder: str) -> Metadata:
    """The table of contents of a sharded checkpoint, safely.

    Raises:
        Exception: of any kind, where it is none.
    """
    with open(os.path.join(folder, CONTENTS), "rb") as file:
        contents: Metadata = _ContentsUnpickler(file).load()
    return contents


class _SafeReader(dcp.FileSystemReader):
    """torch's reader, but for the table of contents. It loads tensors with `weights_only=True` itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        contents: Any = read_contents(str(self.path))
        if getattr(contents, "storage_meta", None) is None:
            contents.storage_meta = StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents


def _empty(description: Any) -> torch.Tensor:
    assert isinstance(description, TensorStorageMetadata), "a weight that is no tensor"
    return torch.empty(description.size, dtype=description.properties.dtype)


def _read_value(folder: str, contents: Metadata, name: str) -> Any:
    """A plain value, which the writer keeps as the bytes of `torch.save`."""
    assert contents.storage_data is not None
    (place,) = (place for index, place in contents.storage_data.items() if index.fqn == name)
    with open(os.path.join(folder, os.path.basename(place.relative_path)), "rb") as file:
        file.seek(place.offset)
        return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


def _insert(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
