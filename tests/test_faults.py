"""Environment failures end a run with one line and lose nothing that was saved."""

from __future__ import annotations

import datetime
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
from composer.core import Callback
from small_shards import copy_to_many_files
from tiny import ROOT

from electra_composer.batches import row_reader
from electra_composer.batches.shards import build_data_spec, read_meta
from electra_composer.batches.stale_memory import SHARED_MEMORY
from electra_composer.checkpoints.resuming import find_corruption
from electra_composer.config import PretrainConfig, ShardsConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.faults import explain, explain_failures
from electra_composer.pretrain import main
from electra_composer.training.builders import CALLBACKS


@pytest.fixture
def pretrain(tiny_yaml):
    """Return `pretrain("key=value", …)`: a run of 8 batches in `tmp_path / "run"`."""

    def start(*overrides: str):
        settings = ["trainer.max_duration=8ba", "trainer.eval_interval=8ba", *overrides]
        return main(load_config(str(tiny_yaml), settings, PretrainConfig))

    return start


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), "run/metrics.jsonl could not be writ"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "x could not be written: Disk quota exceeded; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; fix the folder's"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system; fix the folder's"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "worker died.*smaller data.num_workers",
        ),
        (RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4"), "rank 0 lost the connection"),
    ],
)
def test_in_words(error, words):
    with pytest.raises(UserError, match=words) as caught, explain_failures():
        raise error
    assert str(caught.value).endswith("rerun the same command to resume from the last checkpoint")


def test_everything_else_passes_through():
    assert explain(RuntimeError("shapes do not fit")) is None
    for kind in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), explain_failures():
            raise kind


class KillWorker(Callback):
    """Kills a data loader worker, as the system does when memory runs out."""

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 5:
            os.kill(state.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)


def test_a_dead_loader_worker(pretrain, tmp_path, monkeypatch):
    monkeypatch.setitem(CALLBACKS, "kill_worker", KillWorker)
    with pytest.raises(UserError, match=r"a data loader worker died"):
        pretrain("data.num_workers=2", "callbacks.kill_worker={}", "trainer.max_duration=200ba")
    assert find_corruption(str(tmp_path / "run" / "latest-rank0.pt")) is None
    assert pretrain("data.num_workers=2").state.timestamp.batch.value == 8


@pytest.mark.distributed
def test_a_dead_rank_ends_the_others_within_a_minute(tiny_yaml, tmp_path):
    (tmp_path / "record").mkdir()
    settings = ["batch=6", "signal=9", "rank=1"]
    command = [
        str(Path(sys.executable).with_name("composer")),
        "-n",
        "2",
        str(ROOT / "benchmarks/recorded_run.py"),
    ]
    command += [str(tiny_yaml), f"callbacks.record.folder={tmp_path / 'record'}", "trainer.max_duration=100000ba"]
    command += [f"callbacks.signal_at.{setting}" for setting in settings]
    # The launcher must see the end of rank 1 before that of rank 0, which takes a second to exit.
    done = programs.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", programs.EXIT_SECONDS: "2"},
        check=False,
    )
    ended = time.time()
    assert done.returncode != 0
    assert re.search(r"error: .*rank 0 lost the connection to another rank.*resume from the last", done.stderr)
    assert "Rank 1 crashed with exit code -9" in done.stderr
    assert "Traceback" not in done.stderr
    # The last batch of both ranks was the sixth; everything after it took at most a minute.
    assert ended - (tmp_path / "record" / "rank1.jsonl").stat().st_mtime < 60
    assert find_corruption(str(tmp_path / "run" / "latest-rank0.pt")) is None


@pytest.fixture
def many_shards(shards, tmp_path) -> Path:
    """The rows of the shared shards in a dozen files."""
    return copy_to_many_files(shards, tmp_path / "many")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"\0" * path.stat().st_size)])
def test_a_shard_that_goes_bad_while_it_is_needed(pretrain, many_shards, tmp_path, monkeypatch, workers, damage):
    class Damage(Callback):
        def batch_end(self, state, logger):
            if state.timestamp.batch.value == 5:
                for path in (many_shards / "train").glob("*.mds"):
                    damage(path)

    monkeypatch.setitem(CALLBACKS, "damage", Damage)
    monkeypatch.setattr(row_reader, "OPEN_SHARDS", 1)  # open files stay readable
    copy = tmp_path / "copy"
    shutil.copytree(many_shards, copy)
    settings = [f"data.path={many_shards}", f"data.num_workers={workers}", "trainer.max_duration=30ba"]
    with pytest.raises(UserError, match=r"train/shard\.000\d+\.mds: the shard (cannot be fetched|is corrupt)"):
        pretrain(*settings, "callbacks.damage={}")
    shutil.rmtree(many_shards)
    shutil.copytree(copy, many_shards)
    assert pretrain(*settings).state.timestamp.batch.value == 30


BUILDS_AND_DIES = """
import os, sys, time
from electra_composer.config import ShardsConfig
from electra_composer.batches.shards import build_dataloader, read_meta

config = ShardsConfig(path=sys.argv[1], max_seq_length=32, num_workers=0)
loader = build_dataloader(config, read_meta(sys.argv[1]), "train", 8, shuffle=True, drop_last=True, seed=1)
next(iter(loader))
print(loader.dataset._shm_prefix_int, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not os.path.isdir(SHARED_MEMORY), reason="needs Linux's shared memory")
def test_shared_memory_of_a_killed_run_is_removed_by_the_next(shards):
    """That of a live run is kept."""
    config = ShardsConfig(path=str(shards), max_seq_length=32, num_workers=0)
    command = [sys.executable, "-c", BUILDS_AND_DIES, str(shards)]
    process = programs.Program(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    prefix = f"{int(process.stdout.readline()):06}_"

    def left() -> list[str]:
        return [name for name in os.listdir(SHARED_MEMORY) if name.startswith(prefix)]

    beside = build_data_spec(config, "train", 8, read_meta(str(shards)), seed=3)
    assert f"{prefix}locals" in left()
    os.killpg(process.pid, signal.SIGKILL)  # including its resource tracker, which would clean up
    process.wait()
    assert f"{prefix}locals" in left()
    after = build_data_spec(config, "train", 8, read_meta(str(shards)), seed=3)
    assert left() == [] or after.dataloader.dataset._shm_prefix_int == int(prefix[:-1])
    mine = f"{beside.dataloader.dataset._shm_prefix_int:06}_locals"
    assert os.path.exists(os.path.join(SHARED_MEMORY, mine))


def test_a_clock_that_jumps_changes_nothing(pretrain, tmp_path, monkeypatch):
    """Forward by a day and back by two, as when a machine's clock is set."""
    expected = pretrain(f"checkpoints.folder={tmp_path / 'steady'}").state.model.state_dict()
    jumps = iter(range(10**6))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, *zone):
            days = {0: 0, 1: 1, 2: -1}[next(jumps) // 3 % 3]
            return datetime.datetime.now(*zone) + datetime.timedelta(days=days)

    fake = SimpleNamespace(**{**vars(datetime), "datetime": Clock})
    monkeypatch.setattr("composer.trainer.trainer.datetime", fake)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - 86400 * (next(jumps) % 2))
    trainer = pretrain()
    monkeypatch.undo()
    assert next(jumps) > 20
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.state.model.state_dict().items())
    assert pretrain("trainer.max_duration=10ba").state.timestamp.batch.value == 10


def test_a_locale_that_lacks_the_letters(tiny_yaml, tmp_path):
    run = tmp_path / "läuft"
    locale = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    settings = [f"checkpoints.folder={run}", "run_name=größe", "trainer.max_duration=2ba", "schedule.warmup=1ba"]
    done = programs.run(
        [sys.executable, str(ROOT / "electra_composer/pretrain.py"), str(tiny_yaml), *settings],
        capture_output=True,
        env={**os.environ, **locale},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "größe" in (run / "config.yaml").read_text(encoding="utf-8")


def test_weights_and_biases_without_a_network(pretrain, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match=r"loggers.wandb: Weights & Biases could not be started: .*WANDB_MODE=offline"):
        pretrain("loggers.wandb.init_kwargs.settings.init_timeout=2")
    wandb.teardown()


def test_a_loader_worker_that_dies_while_it_hands_a_batch_over():
    """The reader of the queue then fails at the worker's socket instead of learning that the worker died."""
    from multiprocessing.resource_sharer import _ResourceSharer

    error = None
    try:
        _ResourceSharer.get_connection(("/tmp/no-such-socket", 1))
    except OSError as gone:
        error = gone
    assert "transferring a batch" in explain(error)
    assert explain(ConnectionResetError("of something else")) is None
