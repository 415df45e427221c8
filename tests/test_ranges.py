"""The range of every number and time in the schema: there is one, and load_config holds it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from complete_config import COMPLETE, KEYS, SCHEMAS, load_kind, override, write
from composer.core import Time
from hypothesis import HealthCheck, given, settings
from omegaconf import OmegaConf

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.ranges import UNITS, Key, Range, TimeRange, check_ranges

RANGED = {name: pair for name, pair in KEYS.items() if pair[1].range is not None}
ONCE = list({key.path: name for name, (_, key) in reversed(RANGED.items())}.values())  # shared keys in one schema
IS_TIME = re.compile(r"(interval|duration|warmup|decay)$")

no_fixture_check = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_yaml(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    return repr(value) if isinstance(value, int | float) else str(value)


def bounds(limits: Range, is_int: bool) -> tuple[Any, Any]:
    """Return the least and the greatest number in a range."""
    low = limits.ge if limits.ge is not None else limits.gt
    high = limits.le if limits.le is not None else limits.lt
    assert low is not None
    assert high is not None
    if is_int:
        return low, high
    return (
        float(low) if limits.ge is not None else math.nextafter(low, math.inf),
        float(high) if limits.le is not None else math.nextafter(high, -math.inf),
    )


def inside(key: Key) -> st.SearchStrategy[Any]:
    limits = key.range
    if isinstance(limits, TimeRange):
        count = st.integers(int(limits.positive), 10**15)
        fraction = st.floats(0, 1, exclude_min=limits.positive)
        return st.sampled_from(limits.units).flatmap(
            lambda unit: (fraction if unit == "dur" else count).map(lambda number: f"{number}{unit}")
        )
    assert limits is not None
    low, high = bounds(limits, key.kind is int)
    number = st.integers(low, high) if key.kind is int else st.floats(low, high)
    if key.kind is str:  # a size
        return st.integers(low, high).map(lambda size: f"'{size}'")
    others = [*key.words, *(value for value, _ in limits.also), *(["null"] if key.optional else [])]
    return st.one_of(number, st.sampled_from(others)) if others else number


def outside(key: Key) -> st.SearchStrategy[Any]:
    limits = key.range
    if isinstance(limits, TimeRange):
        wrong = ["1e400", "-1", "nan", "inf", "1e16", "1.5dur", "0.5ba", "-0.1dur", "ba", "''", "1min", "10"]
        times = [f"{number}{unit}" for number in ("1e400", "-1", "nan", "1e16") for unit in UNITS]
        foreign = [f"1{unit}" for unit in UNITS if unit not in limits.units]
        return st.sampled_from([*wrong, *times, *foreign, *(["0ba", "0dur"] if limits.positive else [])])
    assert limits is not None
    low, high = bounds(limits, key.kind is int)
    if key.kind is str:
        return st.sampled_from(["0", "-1gb", "1e400gb", "nangb", "many", "5 apples"])
    if key.kind is int:
        named = {value for value, _ in limits.also}
        return st.one_of(st.integers(max_value=low - 1), st.integers(min_value=high + 1)).filter(
            lambda number: number not in named
        )
    return st.one_of(
        st.floats(max_value=low, exclude_max=True),
        st.floats(min_value=high, exclude_min=True),
        st.sampled_from([math.nan, math.inf, -math.inf, 10**400, "1e400", "'nan'", "'-inf'"]),
    )


@pytest.mark.parametrize("name", KEYS)
def test_every_number_and_every_time_has_a_finite_range(name: str) -> None:
    _, key = KEYS[name]
    if key.kind in (int, float):
        assert isinstance(key.range, Range), "a number without a range: annotate it in config.py"
        assert all(math.isfinite(bound) for bound in bounds(key.range, key.kind is int))
    if key.kind is str and not key.words and IS_TIME.search(key.path):
        assert isinstance(key.range, TimeRange), "a time without a range: annotate it in config.py"


@pytest.mark.parametrize("name", ONCE)
def test_a_value_just_outside_is_refused_by_its_key(name: str, tmp_path: Path) -> None:
    kind, key = RANGED[name]
    if isinstance(key.range, TimeRange):
        beyond = ["1000000000000001ba", "-1ba"]
    elif key.kind is str:
        beyond = ["0"]
    else:
        assert key.range is not None
        low, high = bounds(key.range, key.kind is int)
        named = {value for value, _ in key.range.also}
        steps = [low - 1, high + 1] if key.kind is int else [math.nextafter(low, -1), math.nextafter(high, math.inf)]
        beyond = [as_yaml(low - 2 if value in named else value) for value in steps]
    for text in beyond:
        refuse(tmp_path, kind, key, text)


def refuse(folder: Path, kind: str, key: Key, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_kind(folder, kind, override(key, text))
    message = str(caught.value)
    assert key.path.replace("<name>", "a").removesuffix("[]") in message
    assert message.startswith("the command line: ")
    assert "\n" not in message
    assert len(message) < 500


@given(data=st.data())
@settings(no_fixture_check, max_examples=60)
def test_a_value_anywhere_outside_is_refused_by_its_key(data: st.DataObject, tmp_path: Path) -> None:
    kind, key = RANGED[data.draw(st.sampled_from(ONCE))]
    refuse(tmp_path, kind, key, as_yaml(data.draw(outside(key))))


@given(data=st.data())
@settings(no_fixture_check, max_examples=15)
@pytest.mark.parametrize("kind", SCHEMAS)
def test_values_inside_are_accepted_all_at_once(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    streams = data.draw(st.booleans())
    overrides = []
    for of, key in RANGED.values():
        if of == kind and (streams or not key.path.startswith("data.streams")):
            overrides += override(key, as_yaml(data.draw(inside(key), label=key.path)))
    config = load_kind(tmp_path, kind, list(dict.fromkeys(overrides)))
    check_ranges(config)


@given(text=st.from_regex(r"\A[0-9.eE+ _-]{0,8}(ba|ep|sp|tok|dur|BA|min|)\Z"))
@settings(deadline=None, max_examples=300)
def test_a_time_is_what_composer_reads(text: str) -> None:
    """Whatever is accepted means the same to Composer; of what it reads, only other units and huge values are not."""
    accepted = TimeRange(positive=False).contains(text)
    try:
        time: Time[Any] | None = Time.from_timestring(text)
    except (ValueError, TypeError, AttributeError, OverflowError, AssertionError):
        time = None
    plain = time is not None and text.endswith(UNITS) and 0 <= time.value <= (1 if time.unit.value == "dur" else 1e15)
    assert accepted == plain


@pytest.mark.parametrize(
    ("limits", "integer", "text"),
    [
        (Range(ge=0, lt=1), False, "a number in [0, 1)"),
        (Range(gt=0, le=1e6), False, "a number in (0, 1000000]"),
        (Range(ge=1, le=10**6), True, "an integer from 1 to 1,000,000"),
        (TimeRange(units=("ba",)), False, "a time above 0 and at most 1e15, such as 10000ba"),
    ],
)
def test_ranges_in_words(limits: Range | TimeRange, integer: bool, text: str) -> None:
    assert limits.describe(integer) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "trainer.gradient_clip=-1",
            "trainer.gradient_clip is -1.0; expected a number in (0, 1000000], or null for no",
        ),
        ("trainer.gradient_clip=0", "or null for no clipping"),
        ("checkpoints.keep=-2", "checkpoints.keep is -2; expected an integer from 1 to 1,000,000,000, or -1 for all"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; expected a list of 2 values"),
        ("trainer.eval_batches=0", "or null for the complete validation set"),
        ("data.num_workers=100000", "data.num_workers is 100000; expected an integer from 0 to 256, or auto"),
        (f"optimizer.lr={'9' * 400}", "optimizer.lr: int too large to convert to float"),
        (f"seed={'9' * 400}", "seed is 9999"),
        (f"seed={'9' * 5000}", "the value cannot be read"),
        (f"seed=0x{'f' * 5000}", "seed is an integer of thousands of digits"),
        ("data.epoch_size=1e400m", "data.epoch_size is '1e400m'; expected an integer from 1 to 1,000,000,000,000"),
        ("optimizer.lr=${seed}", "optimizer.lr is 42.0"),
        ("schedule.warmup='10 ba '", "schedule.warmup is '10 ba '; expected a time of 0 or more"),
    ],
)
def test_messages(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_kind(tmp_path, "pretrain", [words])
    assert len(str(caught.value)) < 500


def test_the_file_is_named_where_the_value_is_from_it(tmp_path: Path) -> None:
    path = write(tmp_path, COMPLETE.replace("lr: 5e-4", "lr: .nan"))
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: optimizer\.lr is nan; expected a number in \(0, 10\]"):
        load_config(path, ["seed=1"], PretrainConfig)


def test_an_integer_of_5000_digits_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, COMPLETE + f"seed: {'9' * 5000}\n")
    with pytest.raises(UserError, match="not a readable YAML file"):
        load_config(path, [], PretrainConfig)


def test_defaults_are_in_their_ranges() -> None:
    for _, key in RANGED.values():
        if key.default not in (dataclasses.MISSING, "???", None, *key.words):
            assert key.range is not None
            assert key.range.contains(key.default), key.path


def test_annotated_types_are_those_of_omegaconf() -> None:
    """The annotation does not hide the type."""
    config = OmegaConf.structured(PretrainConfig)
    for dotted, value in {"optimizer.lr": "1e-3", "model.num_layers": "2", "data.num_workers": 3}.items():
        OmegaConf.update(config, dotted, value)
    assert (config.optimizer.lr, config.model.num_layers, config.data.num_workers) == (1e-3, 2, 3)
