"""Numbers of the command lines at and beyond their bounds, and options without effect: one line, or an effect."""

from __future__ import annotations

import argparse
import importlib.util
import math

import pytest
from converter import SCRIPT
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_composer import preview
from electra_composer.arguments import ArgumentParser, number
from electra_composer.corpus.options import Conversion, check_options
from electra_composer.corpus.sources import Source, Sources, read_mixture
from electra_composer.errors import UserError
from electra_composer.finetuning import synthetic
from electra_composer.ranges import Range, keys

spec = importlib.util.spec_from_file_location("convert_owt", SCRIPT)
convert_owt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_owt)

PROGRAMS = {
    "convert": convert_owt.parse_arguments,
    "preview": lambda arguments: preview._parse(["folder", *arguments]),
    "synthetic": lambda arguments: synthetic.main(["--source", "x", "--out", "/dev/null", *arguments]),
}


class Stopped(Exception):
    """Carries the parser of a program, in place of the result of parsing."""


def options_of(program, monkeypatch_class=pytest.MonkeyPatch):
    """Return the options of a program that take a value, by their names."""
    found = {}

    def stop(parser, *_):
        for action in parser._actions:
            if action.option_strings and action.nargs is None and not action.choices:
                found[action.option_strings[-1]] = action
        raise Stopped

    with monkeypatch_class.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", stop)
        with pytest.raises(Stopped):
            getattr(program, "__wrapped__", program)([])
    return found


NUMBERS = {
    "convert": "weight min-characters max-documents max-bytes vocab-size add-vocabulary max-seq-length val-fraction "
    "seed workers txt-documents",
    "preview": "rows seed",
    "synthetic": "train dev max-documents seed",
}
CASES = [(program, f"--{name}") for program, names in NUMBERS.items() for name in names.split()]


def test_every_option_with_a_number_is_in_the_table():
    """Other options take text: their type is not set."""
    for name, program in PROGRAMS.items():
        with_type = {option for option, action in options_of(program).items() if action.type is not None}
        assert with_type == {option for of, option in CASES if of == name}
    declared = {key.path for schema in (Source, Sources, Conversion) for key in keys(schema) if key.range is not None}
    fields = {f"--{path.replace('_', '-')}" for path in declared if "." not in path}
    assert fields == {option for program, option in CASES if program == "convert"}


WORDS = ["nan", "inf", "-inf", "1e400", "-1e400", "", "x", "0x10", "1" * 5000, "-1", "-0.5", "10**6", "1e30", "None"]
common = settings(derandomize=True, database=None, max_examples=60, deadline=None)


@pytest.mark.parametrize(("program", "option"), CASES)
def test_no_value_beyond_the_bounds_passes(program, option):
    convert = options_of(PROGRAMS[program])[option].type
    is_float = option in ("--weight", "--val-fraction")
    high = convert_bound(convert, is_float)

    @common
    @given(st.sampled_from(WORDS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=5))
    def check(text):
        value, message = outcome(convert, text)
        if message is None:
            assert math.isfinite(value)
            assert 0 <= value <= high
            assert isinstance(value, float if is_float else int)
        else:
            assert "; expected a" in message
            assert len(message) < 200
            assert "\n" not in message

    check()
    for text in WORDS:
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)


def outcome(convert, text):
    """Return the value of an argument and None, or None and the error message."""
    try:
        return convert(text), None
    except argparse.ArgumentTypeError as error:
        return None, str(error)


def convert_bound(convert, is_float):
    """Return the largest value of those tried that an option takes; one more is refused."""
    (allowed,) = [cell.cell_contents for cell in convert.__closure__ if isinstance(cell.cell_contents, Range)]
    low = allowed.ge if allowed.gt is None else allowed.gt
    high = allowed.le if allowed.lt is None else allowed.lt
    step = 1e-9 if is_float else 1
    for value, good in (
        (low, allowed.gt is None),
        (low - step, False),
        (low + step, True),
        (high, allowed.lt is None),
        (high + step * max(1, high * 1e-3 if is_float else 1), False),
    ):
        if good:
            assert convert(str(value)) == value
        else:
            with pytest.raises(argparse.ArgumentTypeError):
                convert(str(value))
    return high


def test_sizes_with_a_unit():
    convert = options_of(PROGRAMS["convert"])["--max-bytes"].type
    assert [convert(text) for text in ("50mb", "1.5kb", "7")] == [50 << 20, 1536, 7]
    for text in ("0mb", "-5mb", "nanmb", "infgb", "1e400kb", "5 parsecs"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"such as 50mb"):
            convert(text)


def test_the_message_of_a_program_is_one_line(capsys):
    with pytest.raises(UserError, match=r"argument --rows: is '-3'; expected an integer from 0 to 1,000; see --help"):
        preview._parse(["folder", "--rows", "-3"])
    with pytest.raises(SystemExit) as ended:
        convert_owt.main(["--max-documents", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --max-documents: is '0'; expected an integer from 1 to ")


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "a.txt").write_text("a b\n\nc d")
    return str(tmp_path / "a.txt")


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "-.inf", "1e400", "101", "heavy", "null", "[]", "true"])
def test_weights_of_a_mixture(tmp_path, text_file, value):
    (tmp_path / "mixture.yaml").write_text(f"sources: [{{path: {text_file}, weight: {value}}}]")
    with pytest.raises(UserError, match="weight") as caught:
        check_options(Conversion(Sources(read_mixture(str(tmp_path / "mixture.yaml")))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_documents": 0}, "max_documents is 0"),
        ({"min_characters": -1}, "min_characters is -1"),
        ({"max_bytes": 0}, "max_bytes is 0"),
    ],
)
def test_limits_of_sources_in_code(text_file, options, words):
    with pytest.raises(UserError, match=words):
        check_options(Conversion(Sources.of(text_file, **options)))


# Options without effect.

WITHOUT_EFFECT = [
    ("--source {txt} --text-column body", r"--text-column body has no effect on .*; it is for parquet"),
    ("--source docstrings --text-column body", r"--text-column body has no effect on docstrings"),
    ("--source {jsonl} --txt-documents file", r"--txt-documents file has no effect on .*; it is for \.txt files"),
    ("--source {txt} --dataset a/b", r"--dataset a/b has no effect on .*; it is for the source hub"),
    ("--source {txt} --dataset-config en", r"--dataset-config en has no effect on"),
    ("--source {txt} --revision main", r"--revision main has no effect on"),
    ("--mixture {yaml} --text-column body", r"--text-column has no effect with --mixture; put it into its file"),
    ("--mixture {yaml} --revision main", r"--revision has no effect with --mixture"),
    ("--source {txt} --tokenizer train --add-vocabulary 9", r"--add-vocabulary 9 has no effect with --tokenizer train"),
    ("--source {txt} --tokenizer {txt} --vocab-size 99", r"--vocab-size 99 has no effect with --tokenizer .*train"),
    ("--source {txt} --tokenizer train --cased --keep-accents", r"--cased keeps accents already"),
    ("--source {txt} --tokenizer a/b --cased", r"--cased and --keep-accents are only for a vocab\.txt"),
    ("--source {txt} --tokenizer a/b --keep-accents", r"--cased and --keep-accents are only for a vocab\.txt"),
    ("--source {txt} --engine spark --workers 3", r"--workers has no effect with --engine spark"),
    ("--source {txt} --master local", r"--master local requires --engine spark"),
]


@pytest.mark.parametrize(("line", "message"), WITHOUT_EFFECT)
def test_options_without_effect_are_refused(tmp_path, text_file, line, message):
    (tmp_path / "b.jsonl").write_text('{"text": "a b"}\n')
    (tmp_path / "m.yaml").write_text(f"sources: [{{path: {text_file}}}]")
    files = {"txt": text_file, "jsonl": tmp_path / "b.jsonl", "yaml": tmp_path / "m.yaml"}
    with pytest.raises(UserError, match=message):
        convert_owt.main.__wrapped__([*line.format(**files).split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_option_for_one_of_two_sources_goes_to_that_one(tmp_path, text_file):
    (tmp_path / "b.jsonl").write_text('{"body": "a b"}\n')
    line = ["--source", text_file, "--source", str(tmp_path / "b.jsonl"), "--text-column", "body"]
    conversion, _, _ = convert_owt.parse_arguments([*line, "--txt-documents", "file"])
    first, second = conversion.sources.sources
    assert (first.text_column, first.txt_documents) == ("text", "file")
    assert (second.text_column, second.txt_documents) == ("body", "blank")
    check_options(conversion)
    with pytest.raises(UserError, match="revision main has no effect; it is for the source hub"):
        check_options(Conversion(Sources.of(text_file, revision="main")))


def test_number():
    assert number(Range(ge=0, le=3))("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=r"is '1111.*…'; expected an integer from 0 to 3"):
        number(Range(ge=0, le=3))("1" * 5000)
