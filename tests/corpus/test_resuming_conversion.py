"""Interrupted conversions: resumed from their complete parts with the same result, or refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
from converter import SCRIPT, arguments, assert_same_files, main

from electra_composer.corpus import source_parts
from electra_composer.corpus import tokenizer as tokenizer_module
from electra_composer.corpus.engines import Processes
from electra_composer.corpus.folder_writer import ShardFolder

SMALL_PARTS = """
import runpy, sys
from electra_composer.corpus import chunks, source_parts
source_parts.MIN_PART, chunks.CHUNK_CHARACTERS = 300_000, 50_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Stop(Exception):
    pass


def _processes_that_name(text):
    """Return the ids of running processes with this text in their command line (on Linux; elsewhere none)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def start_with_small_parts(*command):
    return programs.Program([sys.executable, "-c", SMALL_PARTS, *command], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """A text of three million characters, which is divided into ten parts."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("long") / "long.txt"
    words = [f"word{number}" for number in range(1, 100)]
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=rng.randint(3, 90))) + "." for _ in range(10_000)))
    return path


@pytest.fixture(scope="module")
def undisturbed(corpus, long_text, tmp_path_factory):
    """Its conversion by one process, without interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    whole = [str(SCRIPT), *arguments(corpus, out)[2:], "--source", str(long_text)]
    assert start_with_small_parts(*whole).wait(timeout=60) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_conversion_goes_on_after_its_last_whole_part(
    corpus, long_text, undisturbed, tmp_path, number, code
):
    command = [str(SCRIPT), *arguments(corpus, tmp_path / "out")[2:], "--source", str(long_text), "--workers", "2"]
    process = start_with_small_parts(*command)
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out.partial").glob("records/*.json"))) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while _processes_that_name(str(tmp_path)):
        assert time.monotonic() < deadline, "workers outlive the conversion"
        time.sleep(0.2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/meta.json"))
    if number != signal.SIGKILL:
        assert "rerun the same command to resume" in process.stderr.read()
    whole = tmp_path / "out.partial/whole"
    records = {path.stem for path in (tmp_path / "out.partial/records").glob("*.json")}
    shards = [path.relative_to(whole) for path in whole.glob("*/0*/*.mds") if path.parts[-2] in records]
    times = {path: (whole / path).stat().st_mtime_ns for path in shards}
    assert len(times) >= 2

    process = start_with_small_parts(*command)
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    new = tmp_path / "out"
    for path, written in times.items():  # kept, not rewritten
        assert (new / path).stat().st_mtime_ns == written
    assert_same_files(new, undisturbed)


@pytest.fixture
def interrupted(corpus, long_text, tmp_path, monkeypatch):
    """Options of a conversion into `tmp_path / "out"` that was interrupted after two parts."""
    monkeypatch.setattr(source_parts, "MIN_PART", 300_000)
    options = [*arguments(corpus, tmp_path / "out")[2:], "--source", str(long_text)]
    convert = Processes.convert

    def stop_after_two(self, plan, jobs, bar):
        assert len(jobs) > 5
        yield from convert(self, plan, jobs[:2], bar)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop_after_two)
        with pytest.raises(Stop):
            main(options)
    assert sorted(os.listdir(tmp_path / "out.partial/records")) == ["00000.json", "00001.json"]
    return options


def test_other_options_do_not_go_on(interrupted, capsys):
    with pytest.raises(SystemExit):
        main([*interrupted, "--max-seq-length", "32"])
    message = capsys.readouterr().err
    assert "max_seq_length: 64 before, 32 now" in message
    assert "--restart" in message
    summary = main([*interrupted, "--max-seq-length", "32", "--restart"])
    assert summary.continued_tokens == 0


def test_a_changed_source_does_not_go_on(long_text, interrupted, tmp_path, capsys):
    changed = tmp_path / "changed.txt"
    changed.write_text(long_text.read_text() + "\n\none more.")
    with pytest.raises(SystemExit):
        main([*interrupted[:-1], str(changed)])
    assert "files:" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(interrupted, tmp_path):
    summary = main(interrupted)
    assert 0.1 < summary.continued_tokens / summary.total.tokens < 0.3
    assert "interrupted run" in str(summary)
    assert os.listdir(tmp_path) == ["out"]


def test_a_trained_vocabulary_is_kept(long_text, tmp_path, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 300_000)
    options = ["--source", str(long_text), "--tokenizer", "train", "--vocab-size", "150", "--workers", "1"]
    options += ["--no-progress", "--max-seq-length", "64", "--out"]
    convert = Processes.convert

    def stop_after_one(self, plan, jobs, bar):
        yield from convert(self, plan, jobs[:1], bar)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop_after_one)
        with pytest.raises(Stop):
            main([*options, str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "train_tokenizer", None)  # must not be called
        main([*options, str(tmp_path / "a")])
    main([*options, str(tmp_path / "b")])
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_two_conversions_do_not_write_one_folder(corpus, tmp_path, capsys):
    with ShardFolder(str(tmp_path / "out"), plan={}), pytest.raises(SystemExit):
        main(arguments(corpus, tmp_path / "out"))
    assert "another conversion is writing" in capsys.readouterr().err


def test_killed_before_the_folder_has_its_name(interrupted, tmp_path, monkeypatch):
    def stop(self):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("electra_composer.storage.shard_folder.Meta.to_json", stop)
        with pytest.raises(Stop):
            main(interrupted)
    assert not (tmp_path / "out").exists()
    summary = main(interrupted)
    assert summary.continued_tokens == summary.total.tokens  # nothing was left to convert
    whole = str(tmp_path / "whole")
    place = interrupted.index("--out") + 1
    main([*interrupted[:place], whole, *interrupted[place + 1 :]])
    assert_same_files(tmp_path / "out", whole)


def test_a_part_that_was_moved_but_not_recorded_is_made_again(interrupted, tmp_path):
    partial = tmp_path / "out.partial"
    (partial / "records/00001.json").unlink()
    (partial / "whole/train/00001/shard.00000.mds").write_bytes(b"left over")
    summary = main(interrupted)
    place = interrupted.index("--out") + 1
    main([*interrupted[:place], str(tmp_path / "whole"), *interrupted[place + 1 :]])
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    assert 0 < summary.continued_tokens < summary.total.tokens / 5


def test_a_shard_that_has_gone_is_named(interrupted, tmp_path, capsys):
    (tmp_path / "out.partial/whole/train/00001/shard.00000.mds").unlink()
    with pytest.raises(SystemExit):
        main(interrupted)
    assert "train/00001/shard.00000.mds is missing; pass --restart" in capsys.readouterr().err
