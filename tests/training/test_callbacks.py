"""Training metrics counted by hand, milestones over a resume, and the record in checkpoint and folder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from composer import Callback, ComposerModel, Trainer
from composer.callbacks import CheckpointSaver
from composer.core import DataSpec
from composer.loggers import InMemoryLogger

from electra_composer.errors import UserError
from electra_composer.model.losses import OF_TERM, in_order
from electra_composer.training.callbacks import BatchSeed, RunRecord, TrainMetrics, pretraining_metrics
from electra_composer.training.checkpointing import milestone_saver

HAND_COUNT = {
    # 10 tokens, 4 of them masked. The generator's most likely token is right once, its sample twice: 2 are replaced.
    "masked": 4.0, "mlm_correct": 1.0, "sampled_correct": 2.0, "tokens": 10.0, "replaced": 2.0,
    # The discriminator predicts 3 tokens as replaced, 1 correctly, and misses 1 replaced token.
    "true_positive": 1.0, "false_positive": 2.0, "false_negative": 1.0, "true_negative": 6.0,
    "mlm_loss_sum": 12.0, "rtd_loss_sum": 5.0,
}  # fmt: skip

STATS = in_order(["masked", "tokens", "sampled_correct", *OF_TERM["mlm"], *OF_TERM["rtd"]])  # of ELECTRA


def test_metrics_by_hand_count():
    assert pretraining_metrics(HAND_COUNT) == {
        "mlm_loss": 3.0,
        "mlm_accuracy": 0.25,
        "sampled_accuracy": 0.5,
        "rtd_loss": 0.5,
        "rtd_accuracy": 0.7,
        "rtd_precision": pytest.approx(1 / 3),
        "rtd_recall": 0.5,
        "replaced_share": 0.2,
    }


def test_what_has_nothing_to_count_over_is_0():
    metrics = pretraining_metrics({name: torch.tensor(0.0) for name in STATS} | {"tokens": torch.tensor(5.0)})
    assert set(metrics.values()) == {0.0}


class Counting(ComposerModel):
    """Returns sums that follow from the number of tokens in each row."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, batch):
        lengths = (batch["input_ids"] > 0).sum().float()
        stats = {name: torch.zeros(()) for name in STATS}
        stats |= {"tokens": lengths, "true_negative": lengths, "rtd_loss_sum": 2 * lengths}
        stats |= {"masked": lengths / 2, "mlm_correct": lengths / 8}
        return {"out": self.layer(batch["input_ids"].float()), "stats": stats}

    def loss(self, outputs, batch):
        return outputs["out"].square().mean()


def loader(rows: int = 24) -> DataSpec:
    """Return batches of 4 rows of 4 positions; row i has 1 + i mod 4 tokens, so every batch has 10."""
    input_ids = [torch.tensor([1] * (1 + i % 4) + [0] * (3 - i % 4)) for i in range(rows)]
    data = torch.utils.data.DataLoader([{"input_ids": ids} for ids in input_ids], batch_size=4)
    return DataSpec(
        data,
        get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
        get_num_tokens_in_batch=lambda batch: int((batch["input_ids"] > 0).sum()),
    )


def make_trainer(callbacks, max_duration="6ba", **arguments) -> Trainer:
    torch.manual_seed(0)
    model = Counting()
    return Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(),
        max_duration=max_duration,
        callbacks=callbacks,
        progress_bar=False,
        device="cpu",
        precision="fp32",
        **arguments,
    )


@pytest.mark.parametrize("microbatch", [4, 2, 1])
def test_train_metrics_sum_over_microbatches_and_batches(microbatch):
    memory = InMemoryLogger()
    trainer = make_trainer([TrainMetrics("4ba")], loggers=[memory], device_train_microbatch_size=microbatch)
    trainer.fit()
    trainer.close()
    assert [int(when.batch) for when, _ in memory.data["metrics/train/rtd_loss"]] == [
        4,
        6,
    ]  # the end also logs
    assert [value for _, value in memory.data["metrics/train/rtd_loss"]] == [2.0, 2.0]
    assert [value for _, value in memory.data["metrics/train/mlm_accuracy"]] == [0.25, 0.25]
    assert [value for _, value in memory.data["data/fill"]] == [10 / 16, 10 / 16]


@pytest.mark.parametrize("interval", ["0ba", "soon"])
def test_intervals_that_are_none(interval):
    with pytest.raises(UserError, match="log_interval"):
        TrainMetrics(interval)


def test_sums_stay_exact_where_fp32_counts_no_further():
    """2²⁴ + 1 is the first integer that fp32 cannot represent."""
    metrics = TrainMetrics("1000ba")
    tokens = torch.tensor(float(2**24))
    stats = {name: torch.zeros(()) for name in STATS} | {"tokens": tokens, "rtd_loss_sum": tokens}
    state = SimpleNamespace(outputs={"stats": stats}, batch={"input_ids": torch.zeros(1, 4)})
    metrics.before_train_batch(state, None)
    metrics.after_loss(state, None)
    stats["tokens"] = torch.tensor(1.0)
    metrics.after_loss(state, None)
    metrics.is_due = lambda state, event: False
    metrics.batch_end(state, None)
    assert metrics.sums[STATS.index("tokens")].item() == 2**24 + 1


def test_a_batch_that_starts_over_is_counted_once():
    """When a microbatch runs out of memory, Composer repeats the first microbatches of the batch."""
    metrics = TrainMetrics("1000ba")
    metrics.is_due = lambda state, event: False
    state = SimpleNamespace(
        outputs={"stats": {name: torch.ones(()) for name in STATS}}, batch={"input_ids": torch.zeros(1, 4)}
    )
    metrics.before_train_batch(state, None)
    metrics.after_loss(state, None)
    metrics.before_train_batch(state, None)
    metrics.after_loss(state, None)
    metrics.after_loss(state, None)
    metrics.batch_end(state, None)
    assert metrics.sums.tolist() == [2.0] * len(STATS)
    assert metrics.places == 8


@pytest.mark.parametrize(
    ("interval", "batches"), [("2ba", [2, 4, 6, 7]), ("16sp", [4, 7]), ("1ep", [6, 7]), ("30tok", [3, 6, 7])]
)
def test_intervals_in_every_unit(interval, batches):
    """An epoch has 6 batches of 4 rows and 10 tokens."""
    memory = InMemoryLogger()
    trainer = make_trainer([TrainMetrics(interval)], "7ba", loggers=[memory])
    trainer.fit()
    trainer.close()
    assert [int(when.batch) for when, _ in memory.data["data/fill"]] == batches


def test_the_seed_of_a_batch_is_that_of_run_process_and_batch():
    """Same state as after `torch.manual_seed`, whatever was drawn before."""

    class Draws(Callback):
        def __init__(self):
            self.drawn = []

        def before_train_batch(self, state, logger):
            self.drawn.append(torch.rand(3).tolist())
            torch.rand(int(torch.randint(9, ())))

    draws = [Draws(), Draws(), Draws()]
    for callback, seed in zip(draws, (1, 1, 2), strict=True):
        trainer = make_trainer([BatchSeed(seed), callback], "3ba")
        torch.rand(seed)
        trainer.fit()
        trainer.close()
    assert draws[0].drawn == draws[1].drawn
    assert len({tuple(numbers) for numbers in draws[0].drawn + draws[2].drawn}) == 6
    torch.manual_seed(int(np.random.SeedSequence([1, 0, 2]).generate_state(1, np.uint64)[0]))
    assert draws[0].drawn[2] == torch.rand(3).tolist()


# --- milestones


@pytest.mark.parametrize(
    ("max_duration", "batches"),
    [("16ba", [1, 2, 4, 8, 16]), ("64sp", [1, 2, 4, 8, 16]), ("160tok", [1, 2, 4, 8, 16]), ("1ep", [1, 2, 3, 6])],
)
def test_milestones_in_every_unit(tmp_path, max_duration, batches):
    # An epoch has 6 batches: 6.25% and 12.5% are both reached at the end of the first.
    trainer = make_trainer([milestone_saver(str(tmp_path), [0.0625, 0.125, 0.25, 0.5, 1.0])], max_duration)
    trainer.fit()
    trainer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"milestone-ba{b}-rank0.pt" for b in batches)


class Crash(Callback):
    def batch_start(self, state, logger):
        if state.timestamp.batch.value == 9:
            raise RuntimeError("power cut")


def test_milestones_fire_once_each_over_a_resume_and_outlive_interval_checkpoints(tmp_path):
    def callbacks():
        return [
            milestone_saver(str(tmp_path), [0.25, 0.5, 1.0], overwrite=True),
            CheckpointSaver(
                folder=str(tmp_path), filename="interval-ba{batch}.pt", remote_file_name=None, save_interval="3ba",
                num_checkpoints_to_keep=1, overwrite=True,
            ),
        ]  # fmt: skip

    trainer = make_trainer([Crash(), *callbacks()], "20ba")
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit()
    trainer.close()
    before = (tmp_path / "milestone-ba5-rank0.pt").stat().st_mtime_ns
    resumed = make_trainer(callbacks(), "20ba", load_path=str(tmp_path / "interval-ba9.pt"))
    assert int(resumed.state.timestamp.batch) == 9
    resumed.fit()
    resumed.close()
    milestones = sorted(path.name for path in tmp_path.glob("milestone*"))
    assert milestones == ["milestone-ba10-rank0.pt", "milestone-ba20-rank0.pt", "milestone-ba5-rank0.pt"]
    assert (tmp_path / "milestone-ba5-rank0.pt").stat().st_mtime_ns == before
    loaded = torch.load(tmp_path / "milestone-ba20-rank0.pt", weights_only=False)
    assert set(loaded["state"]["callbacks"]) >= {"MilestoneSaver", "CheckpointSaver"}


# --- the record


def record(folder, lr: float, print_config: bool = True) -> RunRecord:
    config = {"optimizer": {"lr": lr}, "run_name": "test"}
    files = {"vocab.txt": "[PAD]\nwörd\n", "tokenizer_config.json": "{}"}
    return RunRecord(config, yaml.safe_dump(config), str(folder), files, print_config)


def test_the_record_is_printed_written_and_in_the_checkpoint(tmp_path, capsys):
    memory = InMemoryLogger()
    run = tmp_path / "run"
    saving = {"save_folder": str(run), "save_filename": "ba{batch}.pt", "save_interval": "1ba", "save_overwrite": True}
    trainer = make_trainer([record(run, 0.5)], loggers=[memory], **saving)
    trainer.fit()
    trainer.close()
    assert capsys.readouterr().out.count("lr: 0.5") == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 0.5
    assert (run / "tokenizer" / "vocab.txt").read_text(encoding="utf-8") == "[PAD]\nwörd\n"
    assert memory.hyperparameters["optimizer"] == {"lr": 0.5}
    kept = torch.load(run / "ba6.pt", weights_only=False)["state"]["callbacks"]["RunRecord"]
    assert kept["config"]["run_name"] == "test"
    assert kept["tokenizer_files"]["vocab.txt"] == "[PAD]\nwörd\n"

    # A run that resumes from there keeps its own configuration and replaces the files.
    resumed = make_trainer([record(run, 0.25, print_config=False)], "8ba", load_path=str(run / "ba3.pt"), **saving)
    resumed.fit()
    resumed.close()
    assert "lr" not in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 0.25
    kept = torch.load(run / "ba8.pt", weights_only=False)["state"]["callbacks"]["RunRecord"]
    assert kept["config"]["optimizer"]["lr"] == 0.25
    assert sorted(p.name for p in (run / "tokenizer").iterdir()) == ["tokenizer_config.json", "vocab.txt"]
    assert not list(run.glob("*.tmp")) + list(run.glob("*.old"))
