"""Describe files and folders that were given as a checkpoint and are none, for error messages."""

from __future__ import annotations

import os
import zipfile

EXPECTED = "expected a checkpoint of pretrain.py: a .pt file, the folder of a sharded one, or the run folder of either"

# First bytes of formats that are mistaken for checkpoints.
STARTS = {
    b"\x80": "Python objects, or a file that torch.save of a version before 1.6 wrote; it was not loaded, since that "
    "could run code in the file",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89HDF": "an HDF5 file, such as weights of Keras",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file; fetch it with git lfs pull",
}


def describe_path(path: str) -> str:
    """Describe a path from which no checkpoint can be read.

    Returns:
        A clause such as `a text file`, to follow the path.
    """
    if not os.path.exists(path):
        return (
            f"a link to {os.path.realpath(path)}, which is missing"
            if os.path.islink(path)
            else "no such file or folder"
        )
    if os.path.isdir(path):
        return _describe_folder(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    if not size:
        return "an empty file"
    if not head.strip(b"\0"):
        return "a file that begins with zero bytes, as after a power cut"
    if head.startswith(b"PK"):
        return _describe_zip(path)
    for start, description in STARTS.items():
        if head.startswith(start):
            return description
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:  # the length of the header, and its JSON
        return "a safetensors file"
    if head.lstrip()[:1] == b"<":
        return "a web page or an XML file"
    # A character of several bytes may be cut at the end of what was read.
    if "�" not in head.decode("utf-8", "replace")[:-3] and b"\0" not in head:
        return "a text file"
    return "a file of another format, or a damaged one"


def _describe_folder(path: str) -> str:
    names = sorted(os.listdir(path))
    if not names:
        return "an empty folder"
    if ".metadata" in names:
        return "a sharded checkpoint that is incomplete or damaged"
    if any(name.endswith(".distcp") for name in names):
        return "a sharded checkpoint without its .metadata"
    return "a folder with neither latest-rank0.pt (of a run) nor .metadata (of a sharded checkpoint)"


def _describe_zip(path: str) -> str:
    if not zipfile.is_zipfile(path):
        return "a truncated checkpoint or zip archive: its end is missing"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive"
    if any(name.endswith("/data.pkl") for name in names):
        return "a damaged checkpoint"
    return f"a zip archive of another program ({f'with {names[0]}' if names else 'empty'})"


def describe_content(content: object) -> str:
    """Describe what `torch.load` has read from a file that is no checkpoint of pretrain.py."""
    if content is not None and not isinstance(content, dict):
        return f"a {type(content).__name__} saved by another program"
    keys = [str(key) for key in content or ()]
    names, more = keys[:3], " …" if len(keys) > 3 else ""
    return f"saved by another program, with {', '.join(names) + more if names else 'nothing in it'}"
