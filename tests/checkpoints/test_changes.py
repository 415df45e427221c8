"""Any key of the configuration may be changed between two starts of a run, or the start is refused in one line."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from changed_keys import LENGTH, SETTINGS, cases, overrides_of
from recorded_run import read_record
from resumed_runs import EXTRA, run
from tiny import TINY_YAML

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.pretrain import main
from electra_composer.training.builders import CALLBACKS


@pytest.fixture(scope="module")
def place(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny configuration, and a copy of its shards."""
    folder = tmp_path_factory.mktemp("changes")
    shutil.copytree(shards, folder / "copy")
    (folder / "tiny.yaml").write_text(
        TINY_YAML.replace("SHARDS", str(shards)).replace("FOLDER", str(folder / "none" / "run"))
    )
    return folder


@pytest.fixture(scope="module")
def start(place: Path, shards: Path) -> Callable[..., int]:
    """Return `start(name, …)`, which starts a run in the folder `name`, the first time as a copy of `interrupted`.

    That run crashed in batch 3, with a checkpoint of batch 2.
    """

    def start(name: str, *overrides: str, copy: bool = True) -> int:
        if copy and not (place / name).exists():
            shutil.copytree(place / "interrupted", place / name, symlinks=True)
        changed = [each.replace("SHARDS", str(shards)).replace("COPY", str(place / "copy")) for each in overrides]
        return run(str(place / "tiny.yaml"), place / name, *SETTINGS, *changed)

    assert start("undisturbed", copy=False) == 0
    assert start("interrupted", "callbacks.crash.batch=3", copy=False) == -9
    return start


def losses(folder: Path) -> list[float]:
    record = read_record(folder / "record")
    assert [*record] == [*range(len(record))], "every batch once, in order"
    return [line["loss/train/total"] for line in record.values()]


def rows(folder: Path) -> list[list[str]]:
    return [line["rows"] for line in read_record(folder / "record").values()]


# Combined, so that they take few starts; test_each_key_alone is the long form.
SILENT = {
    "saved, logged and evaluated in another way": [
        "run_name=other",
        "trainer.device=cpu",
        "trainer.device_eval_batch_size=5",
        "trainer.eval_interval=1ba",
        "trainer.on_nonfinite=skip",
        "trainer.progress_bar=true",
        "checkpoints.interval=1ba",
        "checkpoints.keep=1",
        "checkpoints.milestones=[0.5,1.0]",
        "callbacks.memory_monitor={}",
        "callbacks.data_wait={}",
        "loggers={console: {}, metrics_file: {}}",
        "data.tokenizer=SHARDS/tokenizer",
        "data.num_workers=2",
    ],
    "computed in another way": [
        "checkpoints.keep=-1",
        "callbacks.runtime_estimator.log_interval=1ba",
        "trainer.attention=sdpa",
        "trainer.layer_kernels=torch",
        "trainer.cuda_graph=false",
        "trainer.activation_checkpointing=true",
        "objective.masked_lm=chunked",
        "data.num_workers=auto",
    ],
    "no more checkpoints": ["checkpoints.interval=null", "trainer.fsdp={}"],
    "sharded checkpoints": ["trainer.fsdp={state_dict_type: sharded}"],
}


@pytest.mark.parametrize("name", SILENT)
def test_free_changes_leave_the_run_as_it_is(start, place, name, capfd):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not be restored.*")
        assert start(name, *SILENT[name]) == 0
    assert "changed since" not in capfd.readouterr().out
    assert rows(place / name) == rows(place / "undisturbed")
    expected = losses(place / "undisturbed")
    if "trainer.fsdp" in " ".join(SILENT[name]):  # sums the gradient's norm in another order, and the norm is clipped
        expected = pytest.approx(expected, rel=1e-6)
    assert losses(place / name) == expected
    if name == "no more checkpoints":
        assert not list((place / name / "run").glob(f"batch-{LENGTH}*"))


def test_reported_changes_take_effect(start, place, capfd):
    """Those of the optimizer too, although a checkpoint has the settings that it was written with."""
    overrides = [
        *("optimizer.lr=1e-3", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-3", "optimizer.weight_decay=0.5"),
        *("schedule.name=linear", "schedule.warmup=0ba", "trainer.gradient_clip=0.1", "model.dropout=0.0"),
        *("objective.mask_prob=0.25", "objective.gen_weight=2", "objective.sampling=gumbel", "trainer.eval_batches=1"),
    ]
    shutil.copytree(place / "interrupted", place / "reported", symlinks=True)
    settings = [
        f"checkpoints.folder={place / 'reported' / 'run'}",
        f"callbacks.record.folder={place / 'reported' / 'record'}",
    ]
    with patch.dict(CALLBACKS, EXTRA):
        trainer = main(load_config(str(place / "tiny.yaml"), [*SETTINGS, *settings, *overrides], PretrainConfig))
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("changed since"))
    assert "batch-2-rank0.pt was written: optimizer.lr 0.005 → 0.001, optimizer.betas [0.9, 0.999] → [0.8, 0.9]" in line
    assert all(override.split("=")[0] in line for override in overrides)
    groups = trainer.state.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    for group in groups:
        assert (group["initial_lr"], tuple(group["betas"]), group["eps"]) == (1e-3, (0.8, 0.9), 1e-3)
        assert group["lr"] == pytest.approx(1e-3 / LENGTH)  # of the last batch
    assert rows(place / "reported") == rows(place / "undisturbed")
    found = losses(place / "reported")
    assert found[:2] == losses(place / "undisturbed")[:2]
    assert all(map(math.isfinite, found))
    assert found[2:] != losses(place / "undisturbed")[2:]
    # The next checkpoint has the new configuration.
    assert start("reported", *overrides) == 0
    assert "changed since" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "batches"),
    [
        (["trainer.max_duration=1ba"], 3),  # the crash was in batch 3, the checkpoint of batch 2
        (["trainer.max_duration=7ba"], 7),
        (["data.epoch_size=40", "trainer.max_duration=8ba"], 8),
        (["data.path=", "data.streams.a={path: SHARDS, choose: 150}"], LENGTH),
        (["data.path=COPY", "trainer.device_train_microbatch_size=4"], LENGTH),
    ],
    ids=["shorter", "longer", "shorter epochs", "a stream", "moved, microbatches"],
)
def test_other_lengths_and_data(start, place, overrides, batches, request, capfd):
    name = request.node.callspec.id
    assert start(name, *overrides) == 0
    output = capfd.readouterr().out
    assert f"{overrides[0].split('=')[0]} " in output.split("changed since")[1]
    assert len(losses(place / name)) == batches
    assert len({len(batch) for batch in rows(place / name)}) == 1
    if batches < LENGTH:
        assert "this run is complete: 2ba are done" in output
    if "moved" in name:
        assert rows(place / name) == rows(place / "undisturbed")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=2"], r"interrupted.run.batch-2-rank0.pt was written with seed=1, but this start has seed=2: its posit"),
        (["model.num_heads=4"], r"model.num_heads=2, but this start has model.num_heads=4: its weights are of that mo"),
        (["data.train_split=val"], r"written after 16 rows of an epoch, and the data now has 8 rows per epoch"),
        (["checkpoints.load_path=COPY"], r"checkpoints.load_path=null, but this start .*: it applies to the first"),
    ],
)
def test_a_refused_start_leaves_the_folder_as_it_is(start, place, overrides, message):
    if "val" in overrides[0]:
        overrides = [*overrides, "data.epoch_size=8"]

    def times() -> dict[Path, int]:
        files = (place / "interrupted" / "run").rglob("*")
        return {path: path.lstat().st_mtime_ns for path in files if path.is_file() and path.name != ".lock"}

    before = times()
    with pytest.raises(UserError, match=message):
        start("interrupted", *overrides)
    assert times() == before


def test_another_runs_checkpoint_is_compared_too(start, place):
    """Its weights alone may be taken with another seed and batch size."""
    load = [f"checkpoints.load_path={place / 'interrupted' / 'run'}", "trainer.global_train_batch_size=4", "seed=2"]
    with pytest.raises(UserError, match=r"seed=1, trainer.*_size=8, but .*or checkpoints.load_weights_only=true for"):
        start("new", *load, copy=False)
    assert start("new", *load, "checkpoints.load_weights_only=true", copy=False) == 0
    assert len(losses(place / "new")) == LENGTH
    assert start("new", *load, "checkpoints.load_weights_only=true", "trainer.max_duration=6ba") == 0  # the same again
    assert len(losses(place / "new")) == 6


@pytest.mark.long
@pytest.mark.parametrize(("kind", "key", "value"), cases(), ids=lambda value: value.split(" ")[0])
def test_each_key_alone(start, place, kind, key, value, request, capfd):
    if key == "trainer.deterministic":
        pytest.skip("stays on in this process; training/test_determinism.py")
    name = re.sub(r"\W+", "-", request.node.callspec.id)
    overrides = overrides_of(key, value)
    if "streams" in key:
        overrides = ["data.path=", "data.streams.a.path=SHARDS", *overrides]
    if key.startswith("trainer.fsdp."):
        overrides = ["trainer.fsdp={}", *overrides]
    if kind == "refused":
        with pytest.raises(UserError):
            start(name, *overrides)
        return
    assert start(name, *overrides) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("changed since")]
    assert len(said) == (kind == "reported" or "streams" in key)  # from data.path to data.streams in the latter case
    assert kind != "reported" or key.replace("<name>", "a") in said[0]
    found = losses(place / name)
    assert all(map(math.isfinite, found))
    exact = kind == "free" and key not in ("trainer.device_train_microbatch_size", "trainer.compile", "data.path")
    if exact and key.startswith("trainer.fsdp"):  # the clipped norm is added in another order
        assert found == pytest.approx(losses(place / "undisturbed"), rel=1e-6)
    elif exact:
        assert found == losses(place / "undisturbed")
