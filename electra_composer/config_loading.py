"""How a YAML file and command-line overrides become one checked configuration of the schema in `config.py`."""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from electra_composer.config import RunConfig
from electra_composer.errors import UserError, report_user_errors

Config = TypeVar("Config", bound=RunConfig)


def load_config(path: str, overrides: list[str], schema: type[Config]) -> Config:
    """Read a YAML file, apply `key=value` overrides, check everything, resolve interpolations.

    Args:
        path: the YAML file.
        overrides: such as `["optimizer.lr=1e-3", "data.path=data/owt"]`; the last one of a key wins.
        schema: :class:`PretrainConfig` or :class:`GlueConfig`.

    Returns:
        An instance of `schema` with nothing missing and nothing unresolved.

    Raises:
        UserError: file missing or not YAML, unknown key (with its full path and the nearest valid one), wrong type,
            missing required value, or an interpolation that leads nowhere.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected a YAML such as yamls/small.yaml as the first argument")
    try:
        with open(path, encoding="utf-8") as file:
            from_file = OmegaConf.load(file)  # refuses a key that is given twice, which yaml.safe_load does not
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(from_file):
        raise UserError(f"{path}: expected keys and values at the top level, found a list")
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override!r}: overrides are written key=value, such as optimizer.lr=1e-3")
        try:
            OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{override!r}: its value cannot be read: {' '.join(str(error).split())}") from error
    config = OmegaConf.structured(schema)
    try:
        # One key at a time, so that a message can name the one that is wrong; interpolations stay as they are until
        # everything is merged, so that an override of what they point to is heard.
        file_content = OmegaConf.to_container(from_file, resolve=False)
        assert isinstance(file_content, dict)
        pieces = [(path, str(key), OmegaConf.create({key: value})) for key, value in file_content.items()]
        for override in overrides:
            pieces.append(("the command line", override.split("=")[0], OmegaConf.from_dotlist([override])))
        for origin, key, piece in pieces:
            content = OmegaConf.to_container(piece, resolve=False)
            _refuse_unknown_keys(content, schema, origin)
            if key.split(".")[0] == "data" and "streams" in config.data and _says_no_path(content):
                piece.data.path = ""
            try:
                config = OmegaConf.merge(config, piece)
            except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list for a dictionary
                full_key = getattr(error, "full_key", None) or key
                raise UserError(f"{origin}: {full_key}: {_first_line(error)}") from error
        _path_or_streams(config, path)
        missing = sorted(key for key in OmegaConf.missing_keys(config))
        if missing:
            raise UserError(
                f"{path}: no value for {', '.join(missing)}: set it there, or as {missing[0]}=… on the command line"
            )
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        full_key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{full_key}: ' if full_key else ''}{_first_line(error)}") from error


def _says_no_path(content: Any) -> bool:
    """Whether a piece of YAML has `path: null` under `data`, as streams want it."""
    data = content.get("data")
    return isinstance(data, dict) and "path" in data and data["path"] is None


def _path_or_streams(config: Any, origin: str) -> None:
    """Refuse both `data.path` and `data.streams`; with the latter, the former is empty instead of missing."""
    if "streams" not in config.data:  # GLUE
        return
    has_path = not OmegaConf.is_missing(config.data, "path") and config.data.path != ""
    if not config.data.streams:
        if not has_path:
            config.data.path = MISSING
    elif has_path:
        raise UserError(
            f"{origin}: data.path ({config.data.path}) and data.streams ({', '.join(config.data.streams)}) are both "
            "given; make the folder one of the streams, or take data.path out (data.path= on the command line)"
        )
    else:
        config.data.path = ""


@report_user_errors
def load_config_from_command_line(schema: type[Config], usage: str) -> Config:
    """`load_config` of `sys.argv`: one YAML file, then any number of `key=value`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: {usage}\n\nThe keys and what they mean are in electra_composer/config.py.")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    return load_config(sys.argv[1], sys.argv[2:], schema)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, keys in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries and lists."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def nearest(name: str, valid: list[str]) -> str:
    """A clause for an error message: the nearest valid name, or all of them if none is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid are {', '.join(sorted(valid))}"


def _refuse_unknown_keys(node: Any, schema: type, origin: str, prefix: str = "", root: type | None = None) -> None:
    """Walk the YAML beside the schema; callbacks and loggers are free dictionaries here, their builder checks them."""
    if not isinstance(node, dict):
        return
    types = get_type_hints(schema)
    valid = [f.name for f in fields(schema)]
    for key, value in node.items():
        full_key = f"{prefix}{key}"
        if key not in valid:
            raise UserError(
                f"{origin}: unknown key {full_key}; {_nearest_key(str(key), prefix, valid, root or schema)}"
            )
        for candidate in (types[key], *getattr(types[key], "__args__", ())):
            if not is_dataclass(candidate):
                continue
            parts = {f"{full_key}.": value}
            if get_origin(types[key]) is dict:  # of parts of one kind, under names that are free here
                parts = {f"{full_key}.{name}.": part for name, part in value.items()} if isinstance(value, dict) else {}
            for path, part in parts.items():
                _refuse_unknown_keys(part, candidate, origin, path, root or schema)  # type: ignore[arg-type]


def _nearest_key(key: str, prefix: str, valid: list[str], root: type) -> str:
    """Names are compared without the path that they share; a right name of another part is found there."""
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return (
        f"did you mean {prefix}{close[0]}?"
        if close
        else f"valid are {', '.join(prefix + name for name in sorted(valid))}"
    )


def _paths(schema: type, prefix: str = "") -> list[str]:
    found = []
    for name, hint in get_type_hints(schema).items():
        found.append(prefix + name)
        below = f"{prefix}{name}.<name>." if get_origin(hint) is dict else f"{prefix}{name}."
        for candidate in (hint, *getattr(hint, "__args__", ())):
            if is_dataclass(candidate):
                found += _paths(candidate, below)  # type: ignore[arg-type]
    return found


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
