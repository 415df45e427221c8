"""Experiment trackers with their real packages, offline: what is logged is read back from what they have written."""

from __future__ import annotations

import importlib.util
import json
import zipfile

import pytest
from tiny_trainer import make_trainer

from electra_composer.errors import UserError
from electra_composer.faults import explain
from electra_composer.training.builders import build_loggers
from electra_composer.training.tracking import PACKAGES

LOSS = "loss/train/total"
BATCHES = 3


def settings(name, folder):
    """Return the arguments of a logger that keeps everything in a folder."""
    return {
        "comet": {
            "project_name": "p",
            "exp_kwargs": {"offline_directory": str(folder / "comet"), "log_env_host": False},
        },
        "mlflow": {"tracking_uri": (folder / "mlruns").as_uri(), "experiment_name": "e", "log_system_metrics": False},
        "neptune": {"mode": "offline", "project": "me/p"},
    }[name]


def steps_of_mlflow(folder):
    import mlflow

    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_name == "r"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, LOSS)]


def steps_of_comet(folder):
    [archive] = (folder / "comet").glob("*.zip")
    lines = zipfile.ZipFile(archive).read("messages.json").decode().splitlines()
    metrics = [message["payload"].get("metric") for message in map(json.loads, lines)]
    return [metric["step"] for metric in metrics if metric and metric["metricName"] == LOSS]


def steps_of_neptune(folder):
    logs = [file.read_bytes() for file in (folder / ".neptune/offline").rglob("*.log")]
    found = [json.loads(line) for data in logs for line in data.decode().splitlines() if line.strip()]
    values = [each["obj"] for each in found if each["obj"].get("path", [])[-1:] == ["total"]]
    return [point["step"] for value in values for point in value["values"]]


READERS = {"comet": steps_of_comet, "mlflow": steps_of_mlflow, "neptune": steps_of_neptune}


def train(names, folder):
    loggers = build_loggers({name: settings(name, folder) for name in names}, str(folder / "run"), "1ba", False)
    assert list(folder.iterdir()) == []  # nothing is written before the start
    trainer = make_trainer(f"{BATCHES}ba", run_name="r", loggers=loggers)
    trainer.fit()
    trainer.close()


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for name in ("COMET_API_KEY", "NEPTUNE_API_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    monkeypatch.chdir(tmp_path)


def skip_without(*names):
    """Skip without the packages of loggers, which are not imported: Comet reads its settings when it is."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            pytest.skip(f"needs the extra {name}")


@pytest.mark.parametrize("name", list(READERS))
def test_a_tracker_gets_the_losses_offline(tmp_path, name):
    skip_without(name)
    train([name], tmp_path)
    assert READERS[name](tmp_path) == list(range(BATCHES))


def test_several_at_once(tmp_path):
    skip_without(*READERS)
    train(list(READERS), tmp_path)
    for read in READERS.values():
        assert read(tmp_path) == list(range(BATCHES))


def test_comet_without_a_key(tmp_path):
    skip_without("comet")
    with pytest.raises(UserError, match=r"loggers.comet: .*API key.*; set COMET_API_KEY"):
        make_trainer("1ba", loggers=build_loggers({"comet": None}, str(tmp_path), "1ba", False))


def test_a_tracker_that_cannot_start_is_one_line():
    for package, name in (("neptune", "neptune: Neptune"), ("comet_ml", "comet: Comet"), ("mlflow", "mlflow: MLflow")):
        error = type("Failure", (Exception,), {"__module__": f"{package}.exceptions"})(
            "\x1b[95m\n----No\x1b[0m key\nat all"
        )
        assert explain(error).startswith(f"loggers.{name} could not be started: No key at all; set ")
