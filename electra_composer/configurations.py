"""Copy a shipped configuration, or compare two: `electra init small > my.yaml`, `electra config diff A B`.

python -m electra_composer.configurations init small > my.yaml
python -m electra_composer.configurations diff yamls/small.yaml runs/electra-small
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from electra_composer.arguments import ArgumentParser
from electra_composer.config import ObjectiveConfig, PretrainConfig
from electra_composer.errors import UserError, nearest, report_user_errors
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.glue_config import GlueConfig
from electra_composer.key_reference import NO_VALUE, entries, written
from electra_composer.shipped import MODELINE, SCHEMA, configurations, find_configuration, shipped

SAVED = "config.yaml"  # in a run folder
ABSENT = "—"


def describe_configurations() -> str:
    """List the shipped configurations, each with the first line of its comment."""
    known = configurations()
    return "\n".join(f"{name:18} {_title(path)}" for name, path in known.items())


def _title(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if not line.startswith(MODELINE)).lstrip("# ").rstrip(":")


def copy_of(name: str) -> str:
    """Return the text of a shipped configuration, with the path of the schema in its first line.

    Raises:
        UserError: none is shipped under this name.
    """
    known = configurations()
    if name.removesuffix(".yaml") not in known:
        raise UserError(f"no configuration {name} is shipped; {nearest(name, list(known))}")
    first, _, rest = known[name.removesuffix(".yaml")].read_text(encoding="utf-8").partition("\n")
    return f"{MODELINE}{shipped(SCHEMA)}\n{rest}" if first.startswith(MODELINE) else f"{first}\n{rest}"


def effective(path: str) -> dict[str, Any]:
    """Return the values of a configuration by key: those of the file, else the defaults; interpolations are resolved.

    Args:
        path: a YAML file, the name of a shipped one, or a run folder.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    file = os.path.join(path, SAVED) if os.path.isdir(path) else find_configuration(path)
    try:
        content = OmegaConf.load(file)
        if not OmegaConf.is_dict(content):
            raise UserError(f"{file}: expected keys and values at the top level")
        schema = FinetuneConfig if "task" in content else GlueConfig if "tasks" in content else PretrainConfig
        defaults = {entry.path: entry.default for entry in entries(schema)}
        values = OmegaConf.create({})
        for key, value in defaults.items():
            if value is not NO_VALUE and "<name>" not in key and not _within_null(key, defaults):
                OmegaConf.update(values, key, value)
        merged: Any = OmegaConf.to_container(OmegaConf.merge(values, content), resolve=True)
        if schema is PretrainConfig:
            merged["objective"] = vars(ObjectiveConfig(**merged["objective"]).resolved())
    except OSError as error:
        expected = "expected a YAML file, a run folder, or the name of a shipped configuration"
        raise UserError(f"{file}: {error.strerror}; {expected}") from error
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    return dict(_leaves(merged))


def _within_null(key: str, defaults: dict[str, Any]) -> bool:
    """Whether a key is in a section that is null by default, such as trainer.fsdp."""
    parts = key.split(".")
    return any(defaults.get(".".join(parts[:count])) is None for count in range(1, len(parts)) if count)


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)] if prefix else []
    return [leaf for name, part in node.items() for leaf in _leaves(part, f"{prefix}.{name}".lstrip("."))]


def differences(first: str, second: str) -> list[tuple[str, str, str]]:
    """Return the keys whose values differ, with both values as YAML writes them."""
    left, right = effective(first), effective(second)
    keys = [*left, *(key for key in right if key not in left)]
    missing = object()
    rows = [(key, left.get(key, missing), right.get(key, missing)) for key in keys]
    shown = [(key, *(ABSENT if part is missing else written(part) for part in pair)) for key, *pair in rows]
    return [(key, one, other) for key, one, other in shown if one != other]


def table(rows: list[tuple[str, str, str]]) -> str:
    """Format rows in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{key:{widths[0]}}  {one:{widths[1]}}  {other}" for key, one, other in rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="electra", description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    text = f"Print a shipped configuration: electra init small > my.yaml.\n\n{describe_configurations()}"
    raw = argparse.RawDescriptionHelpFormatter
    init = commands.add_parser("init", help="print a shipped configuration", description=text, formatter_class=raw)
    init.add_argument("name", nargs="?", help="such as small; without it, the names are listed")
    text = "Compare two configurations: the keys that differ, with both values. Defaults count as values."
    diff = commands.add_parser("diff", prog="electra config diff", help="compare two configurations", description=text)
    for name in ("first", "second"):
        diff.add_argument(name, help="YAML file, name of a shipped one, or run folder")
    return parser.parse_args(arguments)


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse(argv)
    if arguments.command == "init":
        print(
            copy_of(arguments.name) if arguments.name else describe_configurations(), end="" if arguments.name else "\n"
        )
        return
    rows = differences(arguments.first, arguments.second)
    if not rows:
        print("no differences")
        return
    print(table([("", arguments.first, arguments.second), *rows]))


if __name__ == "__main__":
    main(sys.argv[1:])
