"""Load a YAML file and command-line overrides into one checked configuration of the schema in `config.py`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from electra_composer import signals
from electra_composer.config import RunConfig
from electra_composer.errors import UserError, nearest, report_user_errors
from electra_composer.former_keys import TIE_EMBEDDINGS, upgrade_model
from electra_composer.key_reference import help_text
from electra_composer.ranges import container, expected, faults, is_optional, shown
from electra_composer.ranks import IS_FIRST
from electra_composer.shipped import find_configuration

Config = TypeVar("Config", bound=RunConfig)

CHECK, HELP = "--check", ("-h", "--help")
COMMAND_LINE = "the command line"  # origin of a value in error messages


def load_config(
    path: str, overrides: list[str], schema: type[Config], derive: Callable[[Any], dict[str, Any]] | None = None
) -> Config:
    """Read a YAML file, apply `key=value` overrides, check every key and value, and resolve interpolations.

    Args:
        path: YAML file.
        overrides: such as `["optimizer.lr=1e-3", "data.path=data/owt"]`; the last override of a key wins.
        schema: such as :class:`PretrainConfig`.
        derive: returns values of keys, by their paths, for those that neither the file nor the overrides give; called
            with the merged configuration, in which values may be missing.

    Returns:
        An instance of `schema` with no missing values and no unresolved interpolations.

    Raises:
        UserError: file missing or not YAML, unknown key (the message has its full path and the nearest valid key),
            wrong type, value out of range, missing required value, or an interpolation that cannot be resolved.
    """
    config = OmegaConf.structured(schema)
    pieces = _read_pieces(path, overrides)
    if "sharing" in config.get("model", {}):
        pieces = [(origin, key, _upgrade(origin, piece)) for origin, key, piece in pieces]
    try:
        # Interpolations are resolved after the last merge, so that they see overrides of the keys they refer to.
        for origin, key, piece in pieces:
            content = OmegaConf.to_container(piece, resolve=False)
            _check_structure(content, schema, origin, schema)
            if key.split(".")[0] == "data" and "streams" in config.data and _has_null_path(content):
                piece.data.path = ""
            try:
                config = OmegaConf.unsafe_merge(config, piece)  # which does not copy it for each key
            except (OmegaConfBaseException, OverflowError) as error:  # OverflowError: an integer too large for a float
                raise UserError(f"{origin}: {_explain(error, schema, content, key)}") from error
        _path_or_streams(config, path)
        if derive is not None:
            set_here = {key for _, _, piece in pieces for key in _leaves(OmegaConf.to_container(piece, resolve=False))}
            for key, value in derive(config).items():
                if key not in set_here:
                    OmegaConf.update(config, key, value)
        missing = sorted(key for key in OmegaConf.missing_keys(config))
        if missing:
            raise UserError(
                f"{path}: no value for {', '.join(missing)}; set it there, or as {missing[0]}=… on the command line"
            )
        checked: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(f"{path}: {_explain(error, schema, OmegaConf.to_container(config, resolve=False))}") from error
    for key, fault in faults(checked):
        given = [word.split("=")[0] for word in overrides]
        is_given = any(key == word or key.startswith((f"{word}.", f"{word}[")) for word in given)
        raise UserError(f"{COMMAND_LINE if is_given else path}: {fault}")
    checked.resolve()
    return checked


def _read_pieces(path: str, overrides: list[str]) -> list[tuple[str, str, Any]]:
    """Read the file and the overrides, one key at a time, so that an error message can name the key.

    Returns:
        `(origin, key, configuration)` of each top-level key of the file, then of each override.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected a YAML file such as yamls/small.yaml as the first argument")
    try:
        with open(path, encoding="utf-8") as file:
            from_file = OmegaConf.load(file)  # unlike yaml.safe_load, refuses duplicate keys
    except (yaml.YAMLError, OSError, ValueError, OmegaConfBaseException) as error:  # ValueError: bytes, huge integers
        raise UserError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(from_file):
        raise UserError(f"{path}: expected keys and values at the top level, found a list")
    content = OmegaConf.to_container(from_file, resolve=False)
    assert isinstance(content, dict)
    pieces = [(path, str(key), OmegaConf.create({key: value})) for key, value in content.items()]
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            option = f"; {nearest(override, [CHECK, *HELP])}" if override.startswith("--") else ""
            raise UserError(f"{override!r} is not an override; expected key=value, such as optimizer.lr=1e-3{option}")
        try:
            piece = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:  # ValueError: integers of 5000 digits
            raise UserError(f"{override[:80]!r}: the value cannot be read: {' '.join(str(error).split())}") from error
        pieces.append((COMMAND_LINE, override.split("=")[0], piece))
    return pieces


def _upgrade(origin: str, piece: Any) -> Any:
    """Replace keys of earlier versions, and say by which, once for a file or an override."""
    content = OmegaConf.to_container(piece, resolve=False)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or TIE_EMBEDDINGS not in model:
        return piece
    try:
        upgraded = upgrade_model(model, "${model.embedding_size}")
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    if IS_FIRST:
        now = ", ".join(f"model.{key}={value}" for key, value in upgraded.items() if model.get(key) != value)
        print(f"{origin}: model.{TIE_EMBEDDINGS} is an older name; read as {now}", flush=True)
    return OmegaConf.create({"model": upgraded})


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Return the paths of all values in nested dictionaries."""
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else (f"{prefix}{key}",)


def _has_null_path(content: Any) -> bool:
    """Whether a piece of YAML sets `data.path` to null, as a configuration with streams may."""
    data = content.get("data")
    return isinstance(data, dict) and "path" in data and data["path"] is None


def _path_or_streams(config: Any, origin: str) -> None:
    """Refuse both `data.path` and `data.streams`; with streams alone, make the path empty instead of missing."""
    if "streams" not in config.data:  # GLUE
        return
    has_path = not OmegaConf.is_missing(config.data, "path") and config.data.path != ""
    if not config.data.streams:
        if not has_path:
            config.data.path = MISSING
    elif has_path:
        raise UserError(
            f"{origin}: data.path ({config.data.path}) and data.streams ({', '.join(config.data.streams)}) are both "
            "given; make the folder one of the streams, or remove data.path (data.path= on the command line)"
        )
    else:
        config.data.path = ""


def load_config_from_command_line(
    schema: type[Config], usage: str, derive: Callable[[Any], dict[str, Any]] | None = None
) -> tuple[Config, bool]:
    """Call :func:`load_config` with `sys.argv`: a YAML file or the name of a shipped one, then any number of
    `key=value`.

    With `--help`, the keys of the schema are printed, or those of the part that follows it, and the program ends.

    Args:
        usage: the command line, after `usage: `; more than one on lines of their own.

    Returns:
        The configuration, and whether `--check` is among the arguments: check everything and end.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != CHECK]
    if not arguments or any(argument.partition("=")[0] in HELP for argument in arguments):
        report_user_errors(_print_help)(schema, usage, arguments)
        sys.exit(0 if arguments else 2)
    config = report_user_errors(_load)(arguments[0], arguments[1:], schema, derive)
    signals.end_with(None, exits=False)  # the program goes on
    return config, CHECK in sys.argv


def _load(name: str, *rest: Any) -> RunConfig:
    return load_config(find_configuration(name), *rest)


def _print_help(schema: type, usage: str, arguments: list[str]) -> None:
    """Print the usage, and with `--help` the keys of the schema or of the part that is named after it."""
    usage = "\n       ".join(f"{line} [{CHECK}]" for line in usage.splitlines())
    options = (
        f"{CHECK:14} check everything that a start would refuse, write nothing and end\n"
        f"{'--help [PART]':14} show the keys, or a part of them: --help optimizer, --help optimizer.lr"
    )
    position = next((i for i, argument in enumerate(arguments) if argument.partition("=")[0] in HELP), None)
    if position is None:
        print(f"usage: {usage}\n\n{options}")
        return
    following = [argument for argument in arguments[position + 1 : position + 2] if not _is_input(argument)]
    part = arguments[position].partition("=")[2] or (following[0] if following else None)
    keys = help_text(schema, part)
    if part is not None:
        print(keys.lstrip("\n"))
        return
    title = "Keys of the YAML file, and of the command line as key=value; with defaults and valid values:"
    print(f"usage: {usage}\n\n{options}\n\n{title}\n\n{keys}")


def _is_input(argument: str) -> bool:
    return "=" in argument or argument.endswith((".yaml", ".yml")) or os.path.isfile(argument)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML text, keys in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """Return the resolved configuration as plain dictionaries and lists."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _check_structure(value: Any, hint: Any, origin: str, root: type, path: str = "") -> None:
    """Compare the keys, sections and lists of the YAML with the schema recursively.

    Callbacks and loggers are checked later, by their builders.
    """
    inner, is_reference = container(hint), isinstance(value, str) and "${" in value
    if inner is None or is_reference or (value is None and is_optional(hint)):
        return
    if not isinstance(value, list if get_origin(inner) is list else dict):
        raise UserError(f"{origin}: {path} is {shown(value)}; expected {expected(root, _names(path))}")
    if isinstance(value, list):
        return
    # Of a dictionary, such as data.streams: any names, values of one type.
    hints = get_type_hints(inner) if is_dataclass(inner) else dict.fromkeys(value, get_args(inner)[-1])
    for key, part in value.items():
        prefix = f"{path}." if path else ""
        if key not in hints:
            nearest_key = _nearest_key(str(key), prefix, list(hints), root)
            raise UserError(f"{origin}: unknown key {prefix}{key}; {nearest_key}")
        _check_structure(part, hints[key], origin, root, f"{prefix}{key}")


def _names(path: str) -> list[str]:
    """Return the names and the indices in a path: `optimizer`, `betas`, `0`."""
    return re.findall(r"[^.\[\]]+", path)


def _explain(error: Exception, schema: type, node: Any, key: str = "") -> str:
    """Describe an error of OmegaConf: the value in `node` and what is expected there, if it is of a wrong type."""
    path = getattr(error, "full_key", None) or key
    if path and isinstance(error, ValidationError):
        with contextlib.suppress(LookupError, TypeError, ValueError):  # a name with a dot in it
            for name in _names(path):
                node = node[int(name) if isinstance(node, list) else name]
            return f"{path} is {shown(node)}; expected {expected(schema, _names(path))}"
    first_line = str(error).split("\n")[0][:300]
    return f"{path}: {first_line}" if path else first_line


def _nearest_key(key: str, prefix: str, valid: list[str], root: type) -> str:
    """Suggest a key of the same section, or the same name in another section."""
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(key, valid, prefix)


def _paths(schema: type, prefix: str = "") -> list[str]:
    """Return the full paths of all keys of a schema."""
    found = []
    for name, hint in get_type_hints(schema).items():
        found.append(prefix + name)
        below = f"{prefix}{name}.<name>." if get_origin(hint) is dict else f"{prefix}{name}."
        for candidate in (hint, *getattr(hint, "__args__", ())):
            if is_dataclass(candidate):
                found += _paths(candidate, below)  # type: ignore[arg-type]
    return found
