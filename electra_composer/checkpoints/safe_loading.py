"""Read checkpoint files without running code in them, also where Composer reads them.

Composer's checkpoints are pickles. Composer opens them with `weights_only=False`, and torch.distributed.checkpoint does
the same for the metadata and the plain values of a sharded one, so that a pickle can run any code of its author. This
module reads all of them with `weights_only=True` plus the few plain classes that Composer writes. A checkpoint that
needs more is refused, whether a run resumes from its own folder or starts from another run's.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from composer.utils import checkpoint as composer_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from electra_composer.checkpoints.file_kinds import EXPECTED, describe_path
from electra_composer.errors import UserError

METADATA = ".metadata"  # file of a sharded checkpoint: which tensors and values it holds, and where they are

# Workaround (torch 2.7): torch.distributed.checkpoint pickles the metadata, with private classes, and unpickles it
# without restrictions; goes when torch reads it with weights_only=True. None of these classes runs code.
METADATA_CLASSES = {
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
    """Read a checkpoint file without running code in it.

    Args:
        path: The file.
        map_location: Device of the tensors.
        mmap: Map tensors to memory and read them when they are used.

    Raises:
        UserError: No such file, truncated, not written by torch, or readable by unsafe loading only.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: {describe_path(path)}; {EXPECTED}")
    try:
        with torch.serialization.safe_globals(checkpoint_globals()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many classes for arbitrary bytes
        objects = describe_objects(error)
        raise UserError(f"{path}: {objects or describe_path(path)}; {EXPECTED}") from error


def describe_objects(error: BaseException) -> str | None:
    """Say which objects safe loading has refused; None if that is not what the exception is about."""
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError) or not re.search("unsupported", text, re.IGNORECASE):
        return None
    name = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
    what = f" ({name[1]})" if name else ""
    return (
        f"holds objects other than tensors and plain values{what}; it was not loaded, since that could run code in it"
    )


def checkpoint_globals() -> list[Any]:
    """Return the plain value types that Composer stores beside tensors: times and NumPy's random state."""
    return [
        datetime.timedelta,
        torch.torch_version.TorchVersion,
        np.ndarray,
        np.dtype,
        np.dtypes.UInt32DType,
        np.empty(0).__reduce__()[0],  # NumPy's array constructor; its module differs between NumPy 1 and 2
    ]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type_of_torch = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        is_size = (module, name) == ("torch", "Size")
        if name in METADATA_CLASSES.get(module, ()) or is_type_of_torch or is_size:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unsupported class {module}.{name} in {METADATA}")


def read_metadata(folder: str) -> Metadata:
    """Read the metadata of a sharded checkpoint without running code in the file.

    Raises:
        pickle.UnpicklingError: Classes that do not belong to metadata, or files outside the folder.
    """
    with open(os.path.join(folder, METADATA), "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    for storage in (metadata.storage_data or {}).values():
        if os.path.basename(storage.relative_path) != storage.relative_path:
            raise pickle.UnpicklingError(f"{METADATA} names {storage.relative_path!r}, which is no file of its folder")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def load_value(file: io.BytesIO) -> Any:
    """Load a plain value that `torch.save` wrote.

    Raises:
        pickle.UnpicklingError: It is more than a plain value.
    """
    with torch.serialization.safe_globals(checkpoint_globals()):
        return torch.load(file, weights_only=True)


class SafeLoadPlanner(DefaultLoadPlanner):
    """DefaultLoadPlanner that loads non-tensors as plain values, and requires weights and optimizer state only.

    All weights and the whole optimizer state must be in the checkpoint; anything else may be missing. torch flattens
    dictionaries and lists, so a run with one more callback, or one more key in its recorded configuration, could not be
    resumed otherwise.
    """

    def __init__(self, allow_partial_load: bool = True) -> None:
        super().__init__(allow_partial_load=allow_partial_load)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name in self.state_dict:
            if name.startswith(("state.model.", "state.optimizers.")) and name not in self.metadata.state_dict_metadata:
                raise RuntimeError(f"the checkpoint has no {name}")
        return super().create_local_plan()

    # Workaround (torch 2.7): DefaultLoadPlanner.load_bytes unpickles values without restrictions, so it is given the
    # bytes of a value that was loaded safely; goes when torch has an option for weights_only=True.
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = io.BytesIO()
        torch.save(load_value(value), content)
        content.seek(0)
        super().load_bytes(read_item, content)


class SafeReader(composer_checkpoint.FileSystemReaderWithValidation):
    """Composer's FileSystemReader with safe reading of metadata. torch loads tensors with `weights_only=True`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(str(self.path))
        if any(path[0] == "optimizers" for path in metadata.planner_data.values()):
            # Composer reads this layout of its versions before 0.16 by a function that takes no planner.
            raise UserError(
                f"{self.path}: a sharded checkpoint of Composer before 0.16, which cannot be loaded safely; write it "
                "again with a newer Composer"
            )
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _read_file_for_composer(checkpoint_filepath: Any, map_location: str) -> Any:
    return read_file(os.fspath(checkpoint_filepath), map_location, mmap=False)


# Workaround (composer 0.32): Trainer has no argument for how checkpoints are read, so its (partly private) readers are
# replaced. A Composer without these names raises AttributeError instead of loading unsafely. Goes when Composer loads
# with weights_only=True.
@contextlib.contextmanager
def safe_composer_loading() -> Iterator[None]:
    """Make Composer read checkpoints by the safe readers of this module, while a `Trainer` is built."""
    ours = {
        "_torch_load_with_validation": _read_file_for_composer,
        "FileSystemReaderWithValidation": SafeReader,
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


@contextlib.contextmanager
def dcp_warnings_ignored() -> Iterator[None]:
    """Ignore two warnings of `torch.distributed.checkpoint` that are not about what the caller does."""
    with warnings.catch_warnings():
        # Workaround (torch 2.7): dcp.save and dcp.load warn that they assume a single process although no_dist=True
        # says so; goes when torch warns only without it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # Workaround (torch 2.7): dcp.save uses its own deprecated class; goes when torch 2.7 is no longer supported
        # (later versions do not use it).
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", module=r"torch\.distributed\.checkpoint")
        yield


def cause_of(error: BaseException) -> BaseException:
    """Return the first rank's exception inside a `CheckpointException`; any other exception unchanged.

    A `CheckpointException` is not an `Exception`, and its text is the tracebacks of all ranks.
    """
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
