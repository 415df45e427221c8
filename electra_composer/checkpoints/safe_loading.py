"""Checkpoint files read without running code of theirs, also where it is Composer that reads them.

Composer's checkpoints are pickles, which it opens with `weights_only=False`; torch.distributed.checkpoint opens a
sharded one's table of contents and its values in the same way. A pickle runs whatever its author put there. Here all
of them go through `weights_only=True`, with the few plain classes that Composer itself writes; one that needs more is
refused, whoever wrote it: a run that continues in its own folder as well as one that starts from another's.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from composer.utils import checkpoint as composer_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

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


def read_file(path: str, map_location: str = "cpu", mmap: bool = True) -> Any:
    """The content of a checkpoint file, without running code of the file's.

    Args:
        path: the file.
        map_location: where its tensors go.
        mmap: leave tensors in the file until they are used.

    Raises:
        UserError: no such file, cut short, not of torch's, or one that only unsafe loading could read.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; expected a .pt file that pretrain.py wrote, or its run folder")
    try:
        with torch.serialization.safe_globals(checkpoint_globals()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "unsupported" in line.lower()), lines[0])
        raise UserError(
            f"{path}: not a checkpoint, or one with objects other than tensors and plain values; it was not loaded, "
            f"since that could run code of the file's: {reason.rpartition('WeightsUnpickler error: ')[2]}"
        ) from error
    except Exception as error:  # whatever the reader stumbles over in foreign bytes: there is no end of its kinds
        raise UserError(
            f"{path}: not a readable checkpoint (cut short, or another kind of file?): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def checkpoint_globals() -> list[Any]:
    """Plain value types that Composer puts beside the tensors: times, NumPy's random state. None of them runs code."""
    return [
        datetime.timedelta,
        torch.torch_version.TorchVersion,
        np.ndarray,
        np.dtype,
        np.dtypes.UInt32DType,
        np.empty(0).__reduce__()[0],  # NumPy's own array constructor, whose home moved between versions 1 and 2
    ]


class _ContentsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type_of_torch = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        is_size = (module, name) == ("torch", "Size")
        if name in CONTENT_CLASSES.get(module, ()) or is_type_of_torch or is_size:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unsupported class {module}.{name} in {CONTENTS}")


def read_contents(folder: str) -> Metadata:
    """The table of contents of a sharded checkpoint, without running code of the file's.

    Raises:
        pickle.UnpicklingError: classes in it that no such table has, or files outside of the folder.
    """
    with open(os.path.join(folder, CONTENTS), "rb") as file:
        contents = _ContentsUnpickler(file).load()
    for place in (contents.storage_data or {}).values():
        if os.path.basename(place.relative_path) != place.relative_path:
            raise pickle.UnpicklingError(f"{CONTENTS} names {place.relative_path!r}, which is no file of its folder")
    if getattr(contents, "storage_meta", None) is None:
        contents.storage_meta = StorageMeta()
    return contents


def load_value(file: io.BytesIO) -> Any:
    """A plain value as `torch.save` wrote it.

    Raises:
        pickle.UnpicklingError: more than a plain value.
    """
    with torch.serialization.safe_globals(checkpoint_globals()):
        return torch.load(file, weights_only=True)


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's plan of loading a sharded checkpoint; what is no tensor is read as a plain value, or not at all.

    Weights and the optimizer's state have to be there, all of them. The rest may miss: torch takes a dictionary or list
    apart, and a run with one more callback, or one more key in its recorded configuration, would not load otherwise.
    """

    def __init__(self, allow_partial_load: bool = True) -> None:
        super().__init__(allow_partial_load=allow_partial_load)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name in self.state_dict:
            if name.startswith(("state.model.", "state.optimizers.")) and name not in self.metadata.state_dict_metadata:
                raise RuntimeError(f"the checkpoint has no {name}")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = io.BytesIO()
        torch.save(load_value(value), content)
        content.seek(0)
        super().load_bytes(read_item, content)  # which reads what we have just written


class SafeContents:
    """Before a `FileSystemReader` among the base classes: the table of contents is read by :func:`read_contents`."""

    path: Any
    load_id: str

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        contents = read_contents(str(self.path))
        contents.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return contents


class _Reader(SafeContents, composer_checkpoint.FileSystemReaderWithValidation):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        contents = super().read_metadata(*args, **kwargs)
        if any(path[0] == "optimizers" for path in contents.planner_data.values()):
            # Composer reads this form, of its versions before 0.16, by a function that takes no planner.
            raise UserError(f"{self.path}: a sharded checkpoint of a Composer before 0.16; write it anew with that one")
        return contents


def _load_file(checkpoint_filepath: Any, map_location: str) -> Any:
    return read_file(os.fspath(checkpoint_filepath), map_location, mmap=False)


@contextlib.contextmanager
def composer_loads_safely() -> Iterator[None]:
    """Composer's loading of checkpoints, with the readers of this module in the place of its own.

    For the time in which a `Trainer` is built. Composer has no argument for it. A Composer that has other names for
    its readers is an error here, not a door left open.
    """
    ours = {
        "_torch_load_with_validation": _load_file,
        "FileSystemReaderWithValidation": _Reader,
        "DefaultLoadPlanner": SafeLoadPlanner,
    }
    theirs = {name: getattr(composer_checkpoint, name) for name in ours}
    try:
        for name, reader in ours.items():
            setattr(composer_checkpoint, name, reader)
        yield
    finally:
        for name, reader in theirs.items():
            setattr(composer_checkpoint, name, reader)
