"""Files that come with the package: programs and configurations, in the repository and in an installed wheel.

In the repository `yamls/` and `data_prep/` lie beside the package, in a wheel inside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from electra_composer.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent
SCHEMA = "yamls/schema.json"
MODELINE = "# yaml-language-server: $schema="
"""Beginning of a comment that names the schema of a YAML file to editors."""


def is_installed() -> bool:
    """Return whether this is an installed wheel, without the repository around it."""
    return not (REPOSITORY / "yamls").is_dir()


def shipped(path: str) -> Path:
    """Return where a file of the repository is, such as `yamls/small.yaml` or `electra_composer/pretrain.py`."""
    inside = PACKAGE / path
    return inside if inside.is_file() else REPOSITORY / path


def configurations() -> dict[str, Path]:
    """Return the shipped configurations by name: `small` → the path of `small.yaml`."""
    return {path.stem: path for path in sorted(shipped(SCHEMA).parent.glob("*.yaml"))}


def find_configuration(name: str) -> str:
    """Return the path of a configuration: a file, or one that is shipped, by its name.

    Raises:
        UserError: a name without a folder and a suffix that is no file and not shipped.
    """
    known = configurations()
    if os.path.isfile(name) or "=" in name or name.startswith("-"):
        return name
    if name.removesuffix(".yaml") in known:
        return str(known[name.removesuffix(".yaml")])
    if os.path.basename(name) == name and not name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: no such file, and no shipped configuration; {nearest(name, list(known))}")
    return name
