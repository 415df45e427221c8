"""Completion of the command `electra` in a shell, by argcomplete: commands, configurations, keys and their words.

pip install 'electra-composer[completion]'
eval "$(register-python-argcomplete electra)"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import argcomplete
from argcomplete.completers import FilesCompleter

from electra_composer.config import PretrainConfig
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.glue_config import GlueConfig
from electra_composer.key_reference import entries
from electra_composer.ranges import keys
from electra_composer.shipped import configurations

SCHEMAS: dict[str, type] = {"pretrain": PretrainConfig, "glue": GlueConfig, "finetune": FinetuneConfig}


def complete(commands: Iterable[str]) -> None:
    """Answer the shell that has started this process for completions, and end the process.

    Args:
        commands: names of the commands.
    """
    parser = argparse.ArgumentParser(prog="electra")
    parser.add_argument("command", choices=list(commands))
    arguments = parser.add_argument("arguments", nargs="*")
    arguments.completer = candidates  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, exclude=["-h", "--help"])


def candidates(prefix: str, parsed_args: argparse.Namespace, **others: Any) -> list[str]:
    """Return what may follow: names of configurations and files, then keys with `=`, and their words after it."""
    command, before = parsed_args.command, parsed_args.arguments or []
    names = [*configurations(), *_files(prefix)]
    if command == "init":
        return names
    if command == "config":
        return names if before else ["diff"]
    if command not in SCHEMAS:
        return _files(prefix)
    if not before:
        return names
    key, equals, _ = prefix.partition("=")
    if not equals:
        return [f"{entry.path}=" for entry in entries(SCHEMAS[command]) if entry.section is None]
    found = next((each for each in keys(SCHEMAS[command]) if each.path == key), None)
    if found is None:
        return []
    words = [*map(str, found.words), *(["true", "false"] if bool in found.kinds else [])]
    return [f"{key}={word}" for word in [*words, *(["null"] if found.optional else [])]]


def _files(prefix: str) -> list[str]:
    return list(FilesCompleter()(prefix))
