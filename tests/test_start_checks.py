"""What a start refuses, and when: cheapest checks first; `--check` refuses what a start refuses, and writes nothing."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glue_tiny
import programs
import pytest
from tiny import ROOT, files_of

from electra_composer import glue, pretrain
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetuning import start as glue_start
from electra_composer.glue_config import GlueConfig
from electra_composer.training import preparation

PRETRAIN, GLUE = (str(ROOT / "electra_composer" / f"{name}.py") for name in ("pretrain", "glue"))

pytestmark = pytest.mark.filterwarnings("ignore")


def record(monkeypatch: pytest.MonkeyPatch, names: list[str], *modules: Any) -> list[str]:
    """Return the list to which calls of these functions, each in one of the modules, will be appended by name."""
    calls: list[str] = []

    def called(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    for name in names:
        module = next(each for each in modules if hasattr(each, name))
        monkeypatch.setattr(module, name, functools.partial(called, name, getattr(module, name)))
    return calls


# --- pretraining

STAGES = ["read_data", "build_model", "build_data", "build_trainer"]

FAULTS = [  # overrides, part of the message, stages that are reached
    (["seed=-1"], "seed is -1", 0),
    (["trainer.max_duration=null"], "trainer.max_duration is null", 0),
    (["schedule.warmup=100ba"], "schedule.warmup 100ba: longer", 0),
    (["schedule.warmup=10tok"], "schedule.warmup: 10tok cannot be compared", 0),
    (["callbacks.speed_monitr={}"], "callbacks.speed_monitor", 0),
    (["callbacks.speed_monitor.window_size=0"], "callbacks.speed_monitor.window_size is 0", 0),
    (["callbacks.data_wait={log_interval: 1e400ba}"], "callbacks.data_wait.log_interval is '1e400ba'", 0),
    (["callbacks.early_stopper={monitor: x, dataloader_label: eval, patience: 1e400ba}"], "patience is '1e400ba'", 0),
    (["callbacks.threshold_stopper={monitor: x, dataloader_label: eval, threshold: .nan}"], "threshold is nan", 0),
    (["loggers.metrics_file.pth=x"], "loggers.metrics_file.path", 0),
    (["loggers.tensorboard={flush_interval: -1}"], "loggers.tensorboard.flush_interval is -1", 0),
    (["loggers.metrics_file={path: /dev/full, format: csv}"], "path /dev/full: exists, but is not a regular file", 0),
    (["loggers.tensorboard={log_dir: /proc/logs}"], "loggers.tensorboard.log_dir /proc/logs: cannot be written", 0),
    ([f"loggers.metrics_file.path=/tmp/{'x' * 300}.csv"], "cannot be written in /tmp: File name too long", 0),
    (['checkpoints.folder="a\\0b"'], "embedded null byte", 0),
    (["model.num_heads=5"], "5 heads", 0),
    (["model.tie_encoder=true"], "model.tie_encoder", 0),
    (["objective.mask_prob=0.001"], "objective.mask_prob", 0),
    (["model.max_positions=16"], "model.max_positions", 0),
    (["trainer.device_train_microbatch_size=9"], "1 to 8", 0),
    (["data.num_workers=200"], "data.num_workers is 200; expected at most", 0),
    (["data.eval_streams=[a]"], "data.eval_streams", 0),
    (["checkpoints.load_path=/nowhere.pt"], "/nowhere.pt: no such checkpoint", 0),
    (["checkpoints.folder=/proc/run"], "checkpoints.folder /proc/run: cannot be written", 0),
    (["checkpoints.folder={folder}/tiny.yaml"], "tiny.yaml: exists, but is not a folder", 0),
    (["trainer.fsdp={data_parallel_replicate_degree: 2}"], "data_parallel_replicate_degree is 2", 0),
    (["data.train_split=test"], "no rows in split 'test'", 1),
    (["data.eval_split=test"], "no rows in split 'test'", 1),
    (["model.hidden_size=65536"], "billion parameters", 1),
    (["callbacks.early_stopper={monitor: mlm, dataloader_label: eval}"], "callbacks.early_stopper.monitor", 2),
    (["callbacks.early_stopper={monitor: rtd_auc, dataloader_label: val}"], "expected one of eval", 2),
    (["data.num_canonical_nodes=1000"], "data.num_canonical_nodes is 1000; expected at most", 3),
    (["data.epoch_size=1t"], "an epoch takes 1,000,000,000,000 rows", 3),
    (["schedule.warmup=2ep"], "schedule.warmup 2ep: longer", 3),
    (["trainer.global_train_batch_size=100000"], "fewer than one batch", 3),
]


@pytest.mark.parametrize(("overrides", "message", "reached"), FAULTS, ids=[" ".join(fault[0]) for fault in FAULTS])
def test_a_start_and_a_check_refuse_the_same_at_the_same_stage(
    monkeypatch: pytest.MonkeyPatch, tiny_yaml: Path, tmp_path: Path, overrides: list[str], message: str, reached: int
) -> None:
    overrides = [override.format(folder=tmp_path) if "{folder}" in override else override for override in overrides]
    calls = record(monkeypatch, STAGES, preparation, pretrain)
    before = files_of(tmp_path)
    messages = []
    for check_only in (False, True):
        calls.clear()
        with pytest.raises(UserError) as caught:
            pretrain.main(load_config(str(tiny_yaml), overrides, PretrainConfig), check_only)
        messages.append(str(caught.value))
        assert calls == STAGES[:reached]
        assert files_of(tmp_path) == before
    assert message in messages[0]
    assert messages[0] == messages[1]


def test_a_folder_in_which_another_run_trains(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the data is read."""
    (tmp_path / "run").mkdir()
    holder = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    process = programs.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run" / ".lock")], stdout=-1, text=True, env={}
    )
    try:
        assert process.stdout.readline() == "held\n"
        calls = record(monkeypatch, STAGES, preparation, pretrain)
        for check_only in (False, True):
            with pytest.raises(UserError, match="another process trains in this folder"):
                pretrain.main(load_config(str(tiny_yaml), [], PretrainConfig), check_only)
        assert calls == []
    finally:
        process.kill()
        process.communicate()


def test_a_check_leaves_a_run_as_it_is(tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It neither repairs the link to a corrupt checkpoint nor deletes what a start would replace."""
    words = ["trainer.max_duration=8ba", "checkpoints.keep=-1", "checkpoints.milestones=[]"]
    config = load_config(str(tiny_yaml), words, PretrainConfig)
    pretrain.main(config)
    newest = tmp_path / "run" / os.readlink(tmp_path / "run" / "latest-rank0.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    before = files_of(tmp_path)
    capsys.readouterr()
    assert pretrain.main(config, check_only=True) is None
    names = ", ".join(name for name, _ in preparation.CHECKS)
    assert capsys.readouterr().out.endswith(f"everything checked: {names}; nothing was written\n")
    assert files_of(tmp_path) == before
    for other in tmp_path.glob("run/batch-*"):
        other.write_bytes(b"no checkpoint")
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="there is no complete checkpoint before it"):
        pretrain.main(config, check_only=True)
    assert files_of(tmp_path) == before


ON_A_MACHINE = """
import os, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)
print(done.returncode, os.listdir("/dev/shm"), done.stdout.splitlines()[-1], done.stderr[-500:])
"""


@pytest.mark.slow
def test_a_check_leaves_no_shared_memory(tiny_yaml: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ON_A_MACHINE)
    before = files_of(tmp_path)
    command = [sys.executable, str(ROOT / "tests" / "on_a_node.py"), str(script), PRETRAIN, str(tiny_yaml), "--check"]
    done = programs.run(command, capture_output=True, text=True, cwd=tmp_path)
    if "not permitted" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.startswith("0 [] everything checked: versions, "), done.stdout + done.stderr
    assert files_of(tmp_path) == before


@pytest.mark.distributed
@pytest.mark.parametrize(("words", "status"), [([], 0), (["callbacks.speed_monitr={}"], 2)])
def test_two_ranks_check(tiny_yaml: Path, tmp_path: Path, words: list[str], status: int) -> None:
    before = files_of(tmp_path)
    command = ["composer", "-n", "2", PRETRAIN, str(tiny_yaml), *words, "--check"]
    done = programs.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stdout.count("everything checked: ") == (status == 0)
    assert done.stderr.count("error: ") == (status == 2)
    assert "Traceback" not in done.stderr
    assert files_of(tmp_path) == before


@pytest.mark.distributed
def test_three_processes_check_finetuning(source: tuple[str, str], tmp_path: Path) -> None:
    """Batches of 8, which are no multiple of 3: each process has runs of its own."""
    words = [str(ROOT / "yamls" / "glue.yaml"), *glue_tiny.settings(*source, tmp_path), "--check"]
    done = programs.run(["composer", "-n", "3", GLUE, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything checked: ") == 1
    assert not list(tmp_path.iterdir())


# --- finetuning

GLUE_STAGES = ["load_source", "read_task"]

GLUE_FAULTS = [
    (["loggers.wandb={tags: one}"], "loggers.wandb.tags", 0),
    (["callbacks.x={}"], "unknown callbacks.x", 0),
    (["results=/dev/full"], "results /dev/full: exists, but is not a results file", 0),
    (["results={folder}/pipe"], "pipe: exists, but is not a results file", 0),
    (["results=/proc/results.json"], "results /proc/results.json: cannot be written", 0),
    (["data.cache=/proc/cache"], "data.cache /proc/cache: cannot be written", 0),
    (["predict.enabled=true", "predict.file=/dev/full"], "predict.file /dev/full: exists, but is not a regular", 0),
    (["schedule.warmup=3ep"], "schedule.warmup 3ep: longer", 0),
    (["task_settings={sst2: {warmup: 3ep}}"], "task_settings.sst2: schedule.warmup 3ep: longer", 0),
    (["trainer.device_train_microbatch_size=9"], "1 to 8", 0),
    (["data.num_workers=200"], "data.num_workers is 200; expected at most", 0),
    (["callbacks.early_stopper={monitor: f1, dataloader_label: eval}"], "callbacks.early_stopper.monitor is 'f1'", 1),
    (["tasks=[sst2, cola]"], "CoLA/train.tsv: no such file", 1),
    (["schedule.warmup=1000ba"], "schedule.warmup 1000ba: longer", 2),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A source to finetune, and the data of SST-2."""
    folder = tmp_path_factory.mktemp("glue")
    return glue_tiny.write_source(folder / "source"), glue_tiny.write_data(folder / "data")


@pytest.fixture
def finetune(source: tuple[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`finetune("key=value", …, check_only=…)` in `tmp_path / "run"`."""

    def run(*overrides: str, check_only: bool = False) -> dict[str, Any]:
        words = [*glue_tiny.settings(*source, tmp_path), *overrides]
        return glue.main(load_config(str(ROOT / "yamls" / "glue.yaml"), words, GlueConfig), check_only)

    return run


@pytest.mark.parametrize(("overrides", "message", "reached"), GLUE_FAULTS, ids=[fault[0][-1] for fault in GLUE_FAULTS])
def test_finetuning_and_its_check_refuse_the_same_at_the_same_stage(
    monkeypatch: pytest.MonkeyPatch,
    finetune: Callable[..., dict[str, Any]],
    tmp_path: Path,
    overrides: list[str],
    message: str,
    reached: int,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    overrides = [override.format(folder=tmp_path) if "{folder}" in override else override for override in overrides]
    calls = record(monkeypatch, GLUE_STAGES, glue_start)
    before = files_of(tmp_path)
    messages = []
    for check_only in (False, True):
        calls.clear()
        with pytest.raises(UserError) as caught:
            finetune(*overrides, check_only=check_only)
        messages.append(str(caught.value))
        assert calls == GLUE_STAGES[:reached]
        assert files_of(tmp_path) == before
    assert message in messages[0]
    assert messages[0] == messages[1]


def test_a_check_of_finetuning_leaves_its_runs_as_they_are(
    finetune: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes no cache, and discards no runs that a start would replace."""
    cache = f"data.cache={tmp_path}/cache"
    finetune(cache, check_only=True)
    assert "everything checked: versions, " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    finetune("trainer.max_duration=1ba")
    before = files_of(tmp_path)
    finetune("trainer.max_duration=1ba", cache, "checkpoints.overwrite=true", check_only=True)
    assert "1 runs; " in capsys.readouterr().out
    assert files_of(tmp_path) == before
