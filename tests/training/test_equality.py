"""A run is equal on one rank and on several, under DDP or FSDP2, compiled or not, uninterrupted or resumed.

Real shards and `pretrain.main`; equality.py says which two parts are replaced. Twelve batches of 24 rows pass the
end of an epoch. Three ranks divide neither the embedding tables (128, 40 and 2 rows) nor the layers.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import equality
import programs
import pytest
import torch
from launcher import COMPOSER, launch
from tiny import ROOT

from electra_composer.checkpoints.sharded import is_sharded
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.export import export
from electra_composer.training.step_graph import WARM_UP

pytestmark = pytest.mark.distributed

YAML = """
run_name: equal
seed: 1
data: {path: SHARDS, max_seq_length: 32, num_workers: 0, num_canonical_nodes: 1}
model:
  {num_layers: 2, hidden_size: 32, num_heads: 2, embedding_size: 16, generator_size: 0.5, max_positions: 40,
   dropout: 0.0, attention_dropout: 0.0}
optimizer: {lr: 5.0e-4}
schedule: {warmup: 2ba}
trainer: {max_duration: 12ba, global_train_batch_size: 24, device_eval_batch_size: 8, eval_interval: 12ba,
          eval_batches: 1, precision: fp32, log_interval: 1ba, progress_bar: false, device: cpu,
          cuda_graph: false}
checkpoints: {folder: FOLDER, milestones: [0.5, 1.0]}
"""
TIED = "model.tie_encoder=true model.generator_size=1.0 model.num_heads=1"
GDES = "model.sharing=gdes"
COMPILED = "trainer.compile=true"
FSDP = "trainer.fsdp={}"
MICRO = "trainer.device_train_microbatch_size=10"
SHARDED = "trainer.fsdp={} trainer.fsdp.state_dict_type=sharded"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    (folder / "equal.yaml").write_text(YAML.replace("SHARDS", str(shards)))
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Runs on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        arrangements = [
            "reference",
            f"tied {TIED}",
            f"gdes {GDES}",
            f"fsdp {FSDP}",
            f"micro_recomputed {MICRO} trainer.activation_checkpointing=true",
            "infinite trainer.on_nonfinite=skip",
            f"fsdp_bf16 {FSDP} trainer.precision=amp_bf16",
            f"fsdp_bf16_recomputed {FSDP} trainer.precision=amp_bf16 trainer.fsdp.activation_checkpointing=true",
            f"fsdp_bf16_offloaded {FSDP} trainer.precision=amp_bf16 trainer.fsdp.activation_cpu_offload=true",
        ]
        equality.main(str(folder / "1"), str(folder / "equal.yaml"), arrangements)
    return folder / "1"


def runs_of(folder: Path, processes: int, *arrangements: str) -> Path:
    yaml, out = folder / "equal.yaml", folder / str(processes)
    launch(processes, str(ROOT / "tests" / "equality.py"), str(out), str(yaml), *arrangements)
    return out


@pytest.fixture(scope="module")
def two(folder: Path, one: Path) -> Path:
    """Runs on two ranks."""
    return runs_of(
        folder,
        2,
        "ddp",
        f"ddp_compiled {COMPILED}",
        f"ddp_micro_recorded {MICRO} trainer.cuda_graph=true",
        f"fsdp_micro_recomputed {FSDP} {MICRO} trainer.fsdp.activation_checkpointing=true",
        f"tied_fsdp_compiled {TIED} {COMPILED} {FSDP}",
        f"gdes_fsdp_micro {GDES} {FSDP} {MICRO}",
        f"sharded {SHARDED}",
        f"ddp_from_file@6 checkpoints.load_path={middle(one / 'reference')}",
        f"infinite_fsdp trainer.on_nonfinite=skip {FSDP}",
    )


@pytest.fixture(scope="module")
def three(folder: Path, one: Path, two: Path) -> Path:
    """Runs on three ranks."""
    return runs_of(
        folder,
        3,
        f"fsdp {FSDP}",
        f"tied_fsdp {TIED} {FSDP}",
        f"sharded_from_file@6 {SHARDED} checkpoints.load_path={middle(one / 'reference')}",
        f"sharded_from_sharded@6 {SHARDED} checkpoints.load_path={middle(two / 'sharded')}",
        f"lost_fsdp {FSDP}",
    )


def middle(run: Path) -> Path:
    """Return the checkpoint after six batches, a file or a folder."""
    return run / "milestone-ba6" if (run / "milestone-ba6").is_dir() else run / "milestone-ba6-rank0.pt"


def assert_same_run(run: Path, reference: Path) -> None:
    """Compare rows, losses (to 1e-5) and weights over the batches of `run`."""
    seen, expected = (json.loads((path / "seen.json").read_text()) for path in (run, reference))
    start = int(run.name.partition("@")[2] or 0)
    assert len(seen["losses"]) == 12 - start
    assert seen["rows"] == expected["rows"][start:]
    assert seen["losses"] == pytest.approx(expected["losses"][start:], rel=1e-5)
    weights, theirs = read_checkpoint(str(run)).state, read_checkpoint(str(reference)).state
    assert weights.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # An update of Adam is about lr × 3 = 1e-3 at first, so one lost update of a row is 1,000 times the tolerance.
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def reference_of(run: Path, one: Path) -> Path:
    return one / next((name for name in ("tied", "gdes") if name in run.name), "reference")


TWO = [
    "ddp",
    "ddp_compiled",
    "ddp_micro_recorded",
    "fsdp_micro_recomputed",
    "tied_fsdp_compiled",
    "gdes_fsdp_micro",
    "sharded",
]


@pytest.mark.parametrize("name", ["fsdp", "micro_recomputed"])
def test_one_process(one: Path, name: str) -> None:
    assert_same_run(one / name, one / "reference")


@pytest.mark.parametrize("name", ["recomputed", "offloaded"])
def test_activations_of_another_dtype_than_the_parameters(one: Path, name: str) -> None:
    """FSDP2's casts are the same in the forward and in its repetition."""
    assert_same_run(one / f"fsdp_bf16_{name}", one / "fsdp_bf16")


@pytest.mark.parametrize("name", TWO)
def test_two_processes(one: Path, two: Path, name: str) -> None:
    assert_same_run(two / name, reference_of(two / name, one))


@pytest.mark.parametrize("name", ["fsdp", "tied_fsdp"])
def test_three_processes(one: Path, three: Path, name: str) -> None:
    assert_same_run(three / name, reference_of(three / name, one))


def test_a_shard_that_is_not_updated_is_noticed(one: Path, three: Path) -> None:
    """The tests above fail if the last rank loses its updates of the embeddings (pytorch#176076)."""
    with pytest.raises(AssertionError):
        assert_same_run(three / "lost_fsdp", one / "reference")
    weights, theirs = (read_checkpoint(str(run)).state for run in (three / "lost_fsdp", one / "reference"))
    rows = (weights["embeddings.word.weight"] - theirs["embeddings.word.weight"]).abs().amax(1)
    # It has rows 86 to 127, of which those from 99 are padding; it kept their initial values.
    assert (rows[86:99] > 1e-4).all()
    begin = read_checkpoint(str(middle(three / "lost_fsdp"))).state["embeddings.word.weight"]
    assert torch.equal(weights["embeddings.word.weight"][86:99], begin[86:99])


def test_every_parameter_moves(one: Path, three: Path) -> None:
    """Without a reference: every row of every matrix changes between the sixth batch and the last, on every shard."""
    for run in (one / "reference", three / "fsdp", three / "tied_fsdp"):
        before, after = read_checkpoint(str(middle(run))).state, read_checkpoint(str(run)).state
        for name, tensor in after.items():
            still = (tensor == before[name]).flatten(1 if tensor.ndim > 1 else 0).all(-1)
            if name.endswith("word.weight"):
                still = still[:99]  # the others are padding
            if name.endswith("position.weight"):
                still = still[:32]  # no row is longer
            assert not still.any(), f"{run.name}: {name}"


def test_what_is_compiled(two: Path, one: Path) -> None:
    """The complete forward under DDP, which splits it at its buckets; each layer under FSDP."""
    graphs = {path.parent.name: json.loads(path.read_text())["graphs"] for path in two.glob("*/seen.json")}
    assert graphs["ddp"] == 0
    assert graphs["ddp_compiled"] >= 2  # training and evaluation
    assert graphs["tied_fsdp_compiled"] >= 2


# Checkpoints of one form and number of ranks, loaded into others: weights, optimizer, timestamp, position in the data


def test_what_is_recorded(two: Path) -> None:
    """Two graphs a batch, after the ordinary steps, with the averaging over ranks between them."""
    launches = {name: json.loads((two / name / "seen.json").read_text())["launches"] for name in TWO}
    assert launches == {name: 2 * (12 - WARM_UP) if "recorded" in name else 0 for name in TWO}


def test_from_one_file_to_two_replicas(one: Path, two: Path) -> None:
    assert_same_run(two / "ddp_from_file@6", one / "reference")


@pytest.mark.parametrize("name", ["sharded_from_file@6", "sharded_from_sharded@6"])
def test_to_three_shards(one: Path, three: Path, name: str) -> None:
    assert is_sharded(os.path.realpath(three / name / "latest-rank0.pt"))
    assert_same_run(three / name, one / "reference")


def test_from_two_shards_to_one_process(folder: Path, one: Path, two: Path) -> None:
    """To one file and to one shard; and a run that saved shards resumes in its own folder without FSDP."""
    shutil.copytree(two / "sharded", folder / "own@6", symlinks=True)
    (folder / "own@6" / "latest-rank0.pt").unlink()
    (folder / "own@6" / "latest-rank0.pt").symlink_to("milestone-ba6")
    load = f"checkpoints.load_path={middle(two / 'sharded')}"
    equality.main(str(folder), str(folder / "equal.yaml"), [f"file@6 {load}", f"shard@6 {load} {SHARDED}", "own@6"])
    for name in ("file@6", "shard@6", "own@6"):
        assert_same_run(folder / name, one / "reference")


def test_export_from_both_forms(folder: Path, one: Path, two: Path, three: Path) -> None:
    from transformers import ElectraForPreTraining

    exported = {}
    for name, run in {
        "file": one / "reference",
        "two": two / "sharded",
        "three": three / "sharded_from_file@6",
    }.items():
        export(read_checkpoint(str(run)), str(folder / f"export_{name}"))
        exported[name] = ElectraForPreTraining.from_pretrained(folder / f"export_{name}" / "discriminator").state_dict()
    for name in ("two", "three"):
        for key, tensor in exported["file"].items():
            torch.testing.assert_close(exported[name][key], tensor, rtol=1e-5, atol=1e-6)


def test_an_infinite_loss_of_one_process_is_skipped_by_all(one: Path, two: Path) -> None:
    """Both record it, and continue like the single rank that had the complete batch."""
    run = two / "infinite_fsdp"
    records = [json.loads((run / "trouble" / f"ba2-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [record["gradient_norm"] for record in records] == ["nan", "nan"]
    assert isinstance(records[0]["loss_of_this_process"], float)
    assert isinstance(records[1]["loss_of_this_process"], str)
    rows = json.loads((run / "seen.json").read_text())["rows"]
    assert sorted(records[0]["rows"] + records[1]["rows"]) == rows[1]
    weights, theirs = (read_checkpoint(str(path)).state for path in (run, one / "infinite"))
    for name, tensor in theirs.items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


# Several nodes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux namespaces")
def test_two_nodes(folder: Path, one: Path) -> None:
    """Two launchers with a node rank each that share the run's folder, as on a cluster's file system."""
    alone = str(ROOT / "tests" / "on_a_node.py")
    refused = programs.run([sys.executable, alone], capture_output=True, text=True)
    if refused.returncode != 0:
        assert "OSError" in refused.stderr or "PermissionError" in refused.stderr, refused.stderr
        pytest.skip(f"two nodes would share one /dev/shm: {refused.stderr.splitlines()[-1]}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = ["--world_size", "2", "--nproc", "1", "--master_addr", "127.0.0.1"]
        place += ["--master_port", str(probe.getsockname()[1])]
    script = [alone, str(ROOT / "tests" / "equality.py"), str(folder / "nodes"), str(folder / "equal.yaml"), "ddp"]
    nodes = [
        programs.Program(
            [str(COMPOSER), *place, "--node_rank", str(rank), *script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=300)
            assert node.returncode == 0, output[-4000:]
    finally:
        for node in nodes:
            node.kill()
    assert_same_run(folder / "nodes" / "ddp", one / "reference")
