"""Untrusted files (checkpoints, weights, YAML, indices, tokenizers) never run code.

Weights of transformers (`pytorch_model.bin`) are tested in checkpoints/test_weights.py, sharded checkpoints for export
in finetuning/test_source.py.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer.utils import checkpoint as composer_checkpoint
from tiny import ROOT
from torch.distributed.checkpoint.api import CheckpointException

from electra_composer.batches.shards import build_dataloader, read_meta
from electra_composer.checkpoints.formats import in_format
from electra_composer.checkpoints.safe_loading import SafeLoadPlanner, safe_composer_loading
from electra_composer.checkpoints.sharded import read_all
from electra_composer.config import PretrainConfig, ShardsConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.pretrain import main
from electra_composer.vocabulary import load_tokenizer


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A path that exists once code in a file has run."""
    return tmp_path / "ran"


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_tiny_yaml: Callable[[Path], Path]) -> tuple[Path, Path]:
    """A configuration and its run folder with checkpoints after batches 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    yaml = write_tiny_yaml(folder)
    main(load_config(str(yaml), ["trainer.max_duration=2ba", *FEW], PretrainConfig))
    return yaml, folder / "run"


FEW = ["checkpoints.interval=1ba", "checkpoints.milestones=[]", "checkpoints.keep=-1", "schedule.warmup=0ba"]


def newest(run: Path) -> Path:
    return (run / "latest-rank0.pt").resolve()


def poisoned(path: Path, place: str, evil: Evil, to: Path) -> None:
    """Copy a checkpoint with one part replaced by `evil`."""
    content = torch.load(path, weights_only=False)  # written by this test
    if place == "rng":
        content["rng"] = [evil]
    elif place == "callback":
        content["state"]["callbacks"]["RunRecord"]["config"] = evil
    else:
        content["state"]["optimizers"] = {"AdamW": evil}
    torch.save(content, to)


@pytest.mark.parametrize("place", ["rng", "callback", "optimizer"])
@pytest.mark.parametrize("own", [True, False])
def test_a_checkpoint_to_start_from_or_to_resume(
    trained: tuple[Path, Path], tmp_path: Path, ran: Path, place: str, own: bool
) -> None:
    yaml, run = trained
    there = tmp_path / "there"
    shutil.copytree(run, there, symlinks=True)
    poisoned(newest(run), place, Evil(ran), newest(there))
    start = f"checkpoints.folder={there}" if own else f"checkpoints.load_path={there}"
    here = [] if own else [f"checkpoints.folder={tmp_path / 'here'}"]
    with pytest.raises(UserError, match="could run code in it"):
        main(load_config(str(yaml), ["trainer.max_duration=3ba", *FEW, start, *here], PretrainConfig))
    assert not ran.exists()


def test_composer_itself_does_not_run_it(tmp_path: Path, ran: Path) -> None:
    """Also if Composer is the first to open the file."""
    torch.save({"state": Evil(ran)}, tmp_path / "x.pt")
    with safe_composer_loading(), pytest.raises(UserError, match="could run code"):
        composer_checkpoint.safe_torch_load(tmp_path / "x.pt")
    assert not ran.exists()
    composer_checkpoint.safe_torch_load(tmp_path / "x.pt")  # check of the test itself: without our readers, it runs
    assert ran.exists()


@pytest.fixture
def sharded(tmp_path: Path, ran: Path) -> Callable[..., Path]:
    """Return `sharded(rng)`, which writes a sharded checkpoint with a weight and `rng` as the random state."""

    def make(rng: Any) -> Path:
        state = {"state": {"model": {"model.x": torch.arange(3.0)}, "step": 7}, "rng": [rng, 2]}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "sharded"), no_dist=True)
        return tmp_path / "sharded"

    return make


def load_as_composer_does(folder: Path) -> dict[str, Any]:
    state = {"state": {"model": {"model.x": torch.zeros(3)}, "step": 0}, "rng": [None, None]}
    with safe_composer_loading():
        reader = composer_checkpoint.FileSystemReaderWithValidation(str(folder))
        dcp.load(state, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_is_read(sharded: Callable[..., Path]) -> None:
    folder = sharded("plain")
    for state in (load_as_composer_does(folder), read_all(str(folder))):
        assert state["state"]["model"]["model.x"].tolist() == [0, 1, 2]
        assert state["state"]["step"] == 7
        assert state["rng"] == ["plain", 2]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", ["value", "contents", "outside"])
def test_a_sharded_checkpoint_that_would_run_code(
    sharded: Callable[..., Path], ran: Path, where: str, tmp_path: Path
) -> None:
    folder = sharded(Evil(ran) if where == "value" else "plain")
    if where == "contents":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    if where == "outside":  # a file elsewhere on the disk
        contents = pickle.loads((folder / ".metadata").read_bytes())
        for place in contents.storage_data.values():
            place.relative_path = f"../elsewhere/{place.relative_path}"
        shutil.copytree(folder, tmp_path / "elsewhere")
        (folder / ".metadata").write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match=str(folder)):
        read_all(str(folder))
    with pytest.raises(UserError, match=str(folder)), in_format(str(folder), sharded=False):
        pass
    with pytest.raises((pickle.UnpicklingError, CheckpointException), match=r"(?i)unsupported|no file of its folder"):
        load_as_composer_does(folder)
    assert not ran.exists()
    if where == "value":  # check of the test itself
        dcp.load({"rng": [None, None]}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        assert ran.exists()


def test_a_planner_wants_all_weights_and_no_more(sharded: Callable[..., Path]) -> None:
    folder = str(sharded("plain"))
    more = {"state": {"model": {"model.x": torch.zeros(3)}, "callbacks": {"New": 1}}}
    dcp.load(more, storage_reader=dcp.FileSystemReader(folder), planner=SafeLoadPlanner(), no_dist=True)
    assert more["state"]["model"]["model.x"].tolist() == [0, 1, 2]  # type: ignore[index]
    for lacking in ({"model": {"model.y": torch.zeros(3)}}, {"optimizers": {"AdamW": torch.zeros(3)}}):
        with pytest.raises(CheckpointException, match=r"has no state\.(model\.model\.y|optimizers\.AdamW)"):
            dcp.load(
                {"state": lacking}, storage_reader=dcp.FileSystemReader(folder), planner=SafeLoadPlanner(), no_dist=True
            )


# YAML


def test_a_yaml_that_would_run_code(tiny_yaml: Path, ran: Path) -> None:
    tag = f"!!python/object/apply:os.mkdir ['{ran}']"
    evil = tiny_yaml.with_name("evil.yaml")
    evil.write_text(tiny_yaml.read_text().replace("run_name: tiny", f"run_name: {tag}"))
    with pytest.raises(UserError, match="not a readable YAML file"):
        load_config(str(evil), [], PretrainConfig)
    with pytest.raises(UserError, match="the value cannot be read"):
        load_config(str(tiny_yaml), [f"run_name={tag}"], PretrainConfig)
    assert not ran.exists()


# Shards

OUTSIDE = [
    "../../stolen.mds",
    "/stolen.mds",
    "a/../../../stolen.mds",
    "..",
    "",
    "a//b",
    "C:\\stolen.mds",
    " x",
    7,
    None,
]


def rename_shards(folder: Path, name: Callable[[str], Any], move: bool = False) -> None:
    index = folder / "train" / "index.json"
    content = json.loads(index.read_text())
    for shard in content["shards"]:
        old = shard["raw_data"]["basename"]
        shard["raw_data"]["basename"] = name(old)
        if move:
            (folder / "train" / name(old)).parent.mkdir(exist_ok=True)
            (folder / "train" / old).rename(folder / "train" / name(old))
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
@pytest.mark.parametrize("remote", [False, True])
def test_an_index_that_leads_out_of_its_folder(shards: Path, tmp_path: Path, name: Any, remote: bool) -> None:
    folder = tmp_path / "a" / "shards"
    shutil.copytree(shards, folder)
    (tmp_path / "stolen.mds").write_bytes(b"must not be read or replaced")
    rename_shards(folder, lambda old: name)
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    cache = tmp_path / "b" / "cache"
    config = ShardsConfig(str(folder), 32, num_workers=0)
    if remote:
        config = ShardsConfig(str(cache), 32, num_workers=0, remote=str(folder))
    meta = read_meta(config.path, config.remote)
    with pytest.raises(
        UserError, match=r"outside the folder|cannot be opened|basename is (7|None); expected a JSON text"
    ):
        build_dataloader(config, meta, "train", 4, shuffle=False, drop_last=True, seed=0)
    assert [path for path in sorted(tmp_path.rglob("*")) if not {"cache", "b"} & set(path.parts)] == before
    assert not list(cache.rglob("*.mds"))


@pytest.mark.parametrize("remote", [False, True])
def test_shards_in_folders_inside_are_read(shards: Path, tmp_path: Path, remote: bool) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    rename_shards(folder, lambda old: f"00003/{Path(old).name}", move=True)
    config = ShardsConfig(str(folder), 32, num_workers=0)
    if remote:
        config = ShardsConfig(str(tmp_path / "cache"), 32, num_workers=0, remote=str(folder))
    meta = read_meta(config.path, config.remote)
    loader = build_dataloader(config, meta, "train", 4, shuffle=False, drop_last=True, seed=0)
    assert next(iter(loader))["rows"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["../../evil", "/evil", "..", "a/b", ""])
def test_tokenizer_files_of_a_remote_stay_in_their_folder(shards: Path, tmp_path: Path, name: str) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "b" / "cache"
    shutil.copytree(shards, remote)
    content = json.loads((remote / "meta.json").read_text())
    content["tokenizer"]["files"].append(name)
    (remote / "meta.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a plain file name"):
        read_meta(str(cache), str(remote))
    assert not (cache / "meta.json").exists()
    assert not (tmp_path / "evil").exists()


def test_a_tokenizer_with_code_of_its_own(shards: Path, tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(shards / "tokenizer", folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_tokenizer(str(folder))
    assert not ran.exists()


# The source code

UNSAFE = re.compile(
    r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|pickle\.loads?\(|allow_pickle\s*=\s*True"
    r"|yaml\.(unsafe_|full_)?load\(|allow_unsafe_types\s*=\s*True"
)


def test_nothing_of_ours_loads_unsafely() -> None:
    root = ROOT
    sources = [path for folder in ("electra_composer", "data_prep") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if UNSAFE.search(line) and "`" not in line  # prose about it
    ]
    assert found == []
