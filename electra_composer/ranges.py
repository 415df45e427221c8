"""Ranges of the configuration's values: annotations of the keys in `config.py`, read by :func:`keys`.

`lr: Annotated[float, Range(gt=0, le=10)]` declares the range beside the type. The names of the bounds are those of
`annotated_types` and pydantic. Every range is finite, so NaN, infinity and numbers too large for a library are outside.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from electra_composer.errors import UserError

UNITS = ("ba", "ep", "sp", "tok", "dur")
"""Units of a Composer time: batches, epochs, samples, tokens, and fractions of training."""

LONGEST = 1e15  # of a Composer time other than a fraction

KINDS = {bool: ("true", "false"), str: ("text",)}
"""Names of types without a range in messages."""

ROWS = (("k", 10**3), ("m", 10**6), ("b", 10**9), ("t", 10**12))  # suffixes as in Streaming's `number_abbrev_to_int`
BYTES = (("kb", 2**10), ("mb", 2**20), ("gb", 2**30), ("tb", 2**40), ("b", 1))  # as in its `bytes_to_int`


@dataclass(frozen=True)
class Range:
    """Range of a number.

    Args:
        gt, ge, lt, le: the number is greater than, at least, less than, at most this.
        also: values outside the bounds with a meaning of their own: `((-1, "all"),)`.
        null: what null means, for keys that may be null: `no clipping`.
        suffixes: the number may be text with one of them, which multiplies it.
        example: such a text.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    also: tuple[tuple[float, str], ...] = ()
    null: str = ""
    suffixes: tuple[tuple[str, int], ...] = ()
    example: str = ""

    def contains(self, value: Any) -> bool:
        """Return whether a number, or the number that a text with a suffix stands for, is in the range."""
        number = self._number(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        return any(number == other for other, _ in self.also) or (
            (self.gt is None or number > self.gt)
            and (self.ge is None or number >= self.ge)
            and (self.lt is None or number < self.lt)
            and (self.le is None or number <= self.le)
        )

    def describe(self, integer: bool) -> str:
        """Describe the range for messages: `an integer from 1 to 128`, `a number in (0, 1]`."""
        if integer or self.suffixes:
            text = f"an integer from {self.ge:,} to {self.le:,}"
        else:
            low = f"({self.gt:.12g}" if self.ge is None else f"[{self.ge:.12g}"
            text = f"a number in {low}, " + (f"{self.lt:.12g})" if self.le is None else f"{self.le:.12g}]")
        return f"{text}, such as {self.example}" if self.example else text

    def _number(self, text: str) -> float | None:
        for suffix, factor in (*self.suffixes, ("", 1)) if self.suffixes else ():
            if text.lower().strip().endswith(suffix):
                digits = text.strip()[: len(text.strip()) - len(suffix)]
                try:
                    return float(digits) * factor if factor > 1 else int(digits)
                except ValueError:
                    return None
        return None


@dataclass(frozen=True)
class TimeRange:
    """Range of a Composer time such as `10000ba`.

    Args:
        positive: whether 0 is outside.
        units: units allowed, of :data:`UNITS`.
        null: as in :class:`Range`.
    """

    positive: bool = True
    units: tuple[str, ...] = UNITS
    null: str = ""

    def contains(self, value: Any) -> bool:
        """Return whether a text is a time as Composer reads it (`Time.from_timestring`), with a unit allowed here."""
        match = re.fullmatch(rf"(.+?)({'|'.join(self.units)})", value) if isinstance(value, str) else None
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:
            return False
        if match is None or not 0 <= number <= (1 if match[2] == "dur" else LONGEST):
            return False
        return (match[2] == "dur" or number == int(number)) and (number > 0 or not self.positive)

    def describe(self, integer: bool = False) -> str:
        """Describe the range for messages."""
        examples = [f"{number}{unit}" for number, unit in zip((10000, 3, 1000, "5e9", 0.1), UNITS, strict=True)]
        allowed = [example for example, unit in zip(examples, UNITS, strict=True) if unit in self.units]
        low = "above 0" if self.positive else "of 0 or more"
        return f"a time {low} and at most {LONGEST:.0e}, such as ".replace("+", "") + (
            f"{', '.join(allowed[:-1])} or {allowed[-1]}" if len(allowed) > 1 else allowed[0]
        )


DURATION = TimeRange(units=UNITS[:-1])
"""Range of the duration of training, which is no fraction of itself."""


@dataclass(frozen=True)
class Length:
    """Number of elements of a list."""

    ge: int = 0
    le: int = 10_000

    def describe(self) -> str:
        """Describe the number for messages: ` of 2 values`."""
        return f" of {self.ge if self.ge == self.le else f'{self.ge} to {self.le:,}'} values"


@dataclass(frozen=True)
class Key:
    """A key of a schema with one value, or the elements of a list.

    Attributes:
        path: such as `optimizer.lr`, `optimizer.betas[]`, `data.streams.<name>.repeat`.
        kinds: types of the value: `int`, `float`, `str`, `bool`, or `Any`; none for choices.
        words: values in place of a number, such as `auto`; or all values, of a choice.
        optional: whether it may be null.
        range: None for choices, flags and text.
        default: `dataclasses.MISSING` for elements of lists.
    """

    path: str
    kinds: tuple[Any, ...]
    words: tuple[Any, ...]
    optional: bool
    range: Range | TimeRange | None
    default: Any

    @property
    def kind(self) -> Any:
        """The first of `kinds`."""
        return self.kinds[0] if self.kinds else str

    def expected(self) -> str:
        """Describe the valid values for messages."""
        if self.range is not None:
            parts = [self.range.describe(self.kind is int), *self.words]
        else:
            parts = [name for kind in self.kinds for name in KINDS.get(kind, ())] + [*self.words]
        if isinstance(self.range, Range):
            parts += [f"{value:g} for {meaning}" for value, meaning in self.range.also]
        if self.optional:
            parts.append(f"null for {self.range.null}" if self.range is not None and self.range.null else "null")
        comma = "," if self.range is not None else ""
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}{comma} or {parts[-1]}"


def _unpack(hint: Any) -> tuple[list[Any], list[Any]]:
    """Return the types of a union and the annotations of all of them."""
    if get_origin(hint) is Annotated:
        kinds, notes = _unpack(hint.__origin__)
        return kinds, [*notes, *hint.__metadata__]
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_unpack(part) for part in get_args(hint)]
        return [kind for kinds, _ in parts for kind in kinds], [note for _, notes in parts for note in notes]
    return [hint], []


def _key(path: str, kinds: list[Any], notes: list[Any], default: Any) -> Key:
    words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    scalars = [kind for kind in kinds if kind is not types.NoneType and get_origin(kind) is not Literal]
    ranges = [note for note in notes if isinstance(note, Range | TimeRange)]
    return Key(path, tuple(scalars), words, types.NoneType in kinds, ranges[0] if ranges else None, default)


def container(hint: Any) -> Any:
    """Return the dataclass, or the `dict[…]` or `list[…]`, of a type; None for one value."""
    return next((kind for kind in _unpack(hint)[0] if is_dataclass(kind) or get_origin(kind) in (dict, list)), None)


def is_optional(hint: Any) -> bool:
    """Return whether a value of a type may be null."""
    return types.NoneType in _unpack(hint)[0]


def expected(hint: Any, names: list[str]) -> str:
    """Describe the valid values of a key, a list or a section for messages.

    Args:
        hint: a schema.
        names: the path, such as `["optimizer", "betas", "0"]`.

    Raises:
        KeyError: there is no such key.
    """
    for name in names:
        inner = container(hint)
        hint = get_type_hints(inner, include_extras=True)[name] if is_dataclass(inner) else get_args(inner)[-1]
    kinds, notes = _unpack(hint)
    inner = container(hint)
    if inner is None:
        return _key("", kinds, notes, MISSING).expected()
    count = next((note.describe() for note in notes if isinstance(note, Length)), "")
    text = f"a list{count}" if get_origin(inner) is list else "keys and values"
    return f"{text} or null" if is_optional(hint) else text


def keys(schema: Any, prefix: str = "") -> Iterator[Key]:
    """Return all keys of a dataclass and of those it contains, with their ranges."""
    hints = get_type_hints(schema, include_extras=True)
    for field in fields(schema):
        yield from _keys_of(hints[field.name], prefix + field.name, field.default)


def _keys_of(hint: Any, path: str, default: Any) -> Iterator[Key]:
    kinds, notes = _unpack(hint)
    inner = container(hint)
    if inner is None:
        yield _key(path, kinds, notes, default)
    elif is_dataclass(inner):
        yield from keys(inner, f"{path}.")
    else:
        part = f"{path}.<name>" if get_origin(inner) is dict else f"{path}[]"
        yield from _keys_of(get_args(inner)[-1], part, MISSING)


def faults(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Compare the values of an instance of a schema with their ranges.

    Returns:
        `(path, message)` of each value outside its range.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        yield from _faults_of(getattr(config, field.name), hints[field.name], prefix + field.name)


def _faults_of(value: Any, hint: Any, path: str) -> Iterator[tuple[str, str]]:
    kinds, notes = _unpack(hint)
    if is_dataclass(value):
        yield from faults(value, f"{path}.")
    elif isinstance(value, dict | list):
        inner = next((get_args(kind)[-1] for kind in kinds if get_origin(kind) in (dict, list)), Any)
        for note in notes:
            if isinstance(note, Length) and not note.ge <= len(value) <= note.le:
                yield path, f"{path} is {shown(value)}; expected a list{note.describe()}"
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _faults_of(part, inner, f"{path}.{name}" if isinstance(value, dict) else f"{path}[{name}]")
    elif value is not None:
        key = _key(path, kinds, notes, MISSING)
        if key.range is not None and value not in key.words and not key.range.contains(value):
            yield path, f"{path} is {shown(value)}; expected {key.expected()}"


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every value of a configuration, or of a section of it, against the range in the schema.

    Args:
        prefix: of the keys in messages: `model.` for that section.

    Raises:
        UserError: for the first value outside its range.
    """
    for _, message in faults(config, prefix):
        raise UserError(message)


def check_range(key: str, value: Any, allowed: Range | TimeRange) -> None:
    """Check one value, such as an argument of a callback.

    Raises:
        UserError: it is outside the range.
    """
    if not allowed.contains(value):
        integer = isinstance(allowed, Range) and isinstance(allowed.le, int) and isinstance(allowed.ge, int)
        raise UserError(f"{key} is {shown(value)}; expected {allowed.describe(integer)}")


def shown(value: Any) -> str:
    """Return a value as text for messages, as YAML writes it and at most 60 characters long."""
    try:
        text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:50]}…"
