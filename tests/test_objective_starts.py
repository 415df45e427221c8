"""Starts of pretrain.py from a run of another kind of objective: conversions, refusals, two-stage training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from electra_composer import pretrain
from electra_composer.checkpoints.weights import State, load_source, read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.model.weight_maps import discriminator_embeddings, under
from electra_composer.training.preparation import initial_sizes

SHORT = ("trainer.max_duration=2ba", "trainer.eval_interval=2ba", "report=false")
# A learning rate that changes no fp32 weight by more than rounding: what a run starts with is what it ends with.
STILL = ("optimizer.lr=1e-12", "optimizer.weight_decay=0.0")
UNTIED = ("model.sharing=untied", "model.generator_size=1.0", "model.generator_embedding_size=16")
FROZEN = ("objective.generator=frozen", *UNTIED)

BODY = ["embeddings.", "discriminator."]

Start = Callable[..., State]


@pytest.fixture(scope="module")
def runs(write_tiny_yaml: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train a model of three kinds; return their run folders."""
    folders = {}
    for kind in ("mlm", "electra", "electric"):
        folder = tmp_path_factory.mktemp(kind)
        pretrain.main(load_config(str(write_tiny_yaml(folder)), [f"objective.kind={kind}", *SHORT], PretrainConfig))
        folders[kind] = folder / "run"
    return folders


@pytest.fixture
def start(tiny_yaml: Path, tmp_path: Path) -> Start:
    """Return `start("key=value", …)`, which trains and returns the state of the newest checkpoint."""

    def run(*overrides: str, folder: str = "run") -> State:
        pretrain.main(load_config(str(tiny_yaml), [*SHORT, *overrides], PretrainConfig, initial_sizes))
        return read_checkpoint(str(tmp_path / folder)).state

    return run


def assert_close(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name, rtol=0, atol=1e-7)


@pytest.mark.parametrize("exported", [False, True])
def test_electra_starts_from_a_masked_language_model(
    start: Start, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], exported: bool
) -> None:
    """Embeddings and layers are its own; the generator has another width, and begins at random."""
    source, expected = runs["mlm"], read_checkpoint(str(runs["mlm"])).state
    if exported:
        source = tmp_path / "export"
        export(read_checkpoint(str(runs["mlm"])), str(source))
    state = start(f"model.init_from={source}", *STILL)
    for part in BODY:
        assert_close(under(state, part), under(expected, part))
    assert "its head random; generator: random weights" in capsys.readouterr().out


def test_a_generator_of_the_same_size_is_the_masked_language_model(start: Start, runs: dict[str, Path]) -> None:
    expected = read_checkpoint(str(runs["mlm"])).state
    state = start(f"model.init_from={runs['mlm']}", "model.generator_size=1.0", *STILL)
    assert_close(under(state, "generator."), under(expected, "discriminator."))
    assert_close(under(state, "mlm_head."), under(expected, "lm_head."))


def test_two_stages(start: Start, runs: dict[str, Path]) -> None:
    """The generator stays what it is, although weight decay and a large learning rate act on the discriminator."""
    expected = read_checkpoint(str(runs["mlm"])).state
    state = start(f"model.init_from={runs['mlm']}", *FROZEN, "optimizer.weight_decay=0.5")
    for part, of_first_stage in (("generator_embeddings.", "embeddings."), ("generator.", "discriminator.")):
        assert all(torch.equal(state[part + n], t) for n, t in under(expected, of_first_stage).items())
    assert not torch.equal(state["discriminator.layers.0.up.weight"], expected["discriminator.layers.0.up.weight"])


@pytest.mark.parametrize(
    ("overrides", "kind", "same"),
    [
        (["objective.kind=mlm"], "electra", BODY),
        (
            ["objective.kind=electra_15"],
            "electra",
            [*BODY, "generator.", "mlm_head.", "rtd_head."],
        ),
        (["objective.kind=replace_mlm"], "mlm", [*BODY, "lm_head."]),
        (["objective.kind=all_tokens_mlm"], "electra", [*BODY, "generator.", "mlm_head."]),
        (
            ["objective.kind=electric"],
            "electric",
            [*BODY, "towers.", "mlm_head.", "rtd_head."],
        ),
        (["objective.kind=electric"], "electra", [*BODY, "rtd_head."]),
        (["objective.generator=unigram"], "electric", [*BODY, "rtd_head."]),
    ],
)
def test_what_kinds_have_in_common(
    start: Start, runs: dict[str, Path], overrides: list[str], kind: str, same: list[str]
) -> None:
    state, expected = start(f"model.init_from={runs[kind]}", *overrides, *STILL), read_checkpoint(str(runs[kind])).state
    for part in same:
        assert_close(under(state, part), under(expected, part))


def test_differences_of_embeddings_fit_a_generator_of_another_kind(start: Start, tmp_path: Path) -> None:
    """The towers begin with the discriminator's tables, of which the differences of the former run say nothing."""
    gdes = "model.sharing=gdes"
    expected = discriminator_embeddings(start(gdes, f"checkpoints.folder={tmp_path / 'gdes'}", folder="gdes"))
    state = start(gdes, "objective.kind=electric", f"model.init_from={tmp_path / 'gdes'}", *STILL)
    assert_close(discriminator_embeddings(state), expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["checkpoints.load_path=MLM"],
            "written with objective.kind=mlm, but this start has objective.kind=electra",
        ),
        (
            ["checkpoints.load_path=MLM", "checkpoints.load_weights_only=true"],
            r"was written with objective.kind=mlm, but this start has electra: .* model.init_from=",
        ),
        (
            ["objective.generator=frozen", "model.sharing=untied"],
            "needs a generator to start from; set model.init",
        ),
        (["objective.generator=frozen"], "frozen with model.sharing=tied, where the discriminator would train"),
        (
            ["objective.generator=frozen", "model.sharing=untied", "model.init_from=MLM"],
            r"frozen needs a complete generator .* model.generator_size=1.0",
        ),
        (
            ["objective.kind=mlm", "objective.disc_weight=20"],
            "disc_weight=20.0: no meaning with objective.kind=mlm",
        ),
        (["objective.kind=electric", "objective.generator=trained"], "does not fit objective.kind=electric"),
    ],
)
def test_refused(start: Start, runs: dict[str, Path], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(*(override.replace("MLM", str(runs["mlm"])) for override in overrides))


def test_a_run_is_not_resumed_as_another_kind(start: Start) -> None:
    start("objective.kind=mlm")
    with pytest.raises(
        UserError, match=r"objective.kind=mlm, but this start has objective.kind=electra.*model.init_from="
    ):
        start()


def test_a_checkpoint_from_before_there_were_kinds_is_of_electra(start: Start, tmp_path: Path) -> None:
    start()
    path = tmp_path / "run" / "latest-rank0.pt"
    content = torch.load(path, weights_only=False)
    for key in ("kind", "generator"):
        del content["state"]["callbacks"]["RunRecord"]["config"]["objective"][key]
    torch.save(content, path.resolve())
    with pytest.raises(UserError, match=r"with objective.kind=electra, but this start has objective.kind=electra_15"):
        start("objective.kind=electra_15")
    start("trainer.max_duration=3ba")


def test_an_exported_masked_language_model_is_finetuned_like_its_checkpoint(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    export(read_checkpoint(str(runs["mlm"])), str(tmp_path / "export"))
    expected = load_source(str(runs["mlm"]))
    for source in (tmp_path / "export", tmp_path / "export" / "masked_lm"):
        found = load_source(str(source))
        assert found.weights.keys() == expected.weights.keys()
        assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
    assert not (tmp_path / "export" / "generator").exists()
