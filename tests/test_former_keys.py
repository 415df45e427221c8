"""`model.tie_embeddings` of earlier versions: in YAML files, on the command line and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Kill, weights

from electra_composer import pretrain
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.former_keys import upgrade_model
from electra_composer.training import trainer as trainer_module


def test_both_values_have_todays_names() -> None:
    assert upgrade_model({"tie_embeddings": True, "dropout": 0.1}, 16) == {"sharing": "tied", "dropout": 0.1}
    assert upgrade_model({"tie_embeddings": False}, 16) == {"sharing": "untied", "generator_embedding_size": 16}
    today = {"sharing": "gdes"}
    assert upgrade_model(today, 16) is today


def with_former_key(path: Path, value: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert text.count("embedding_size: 16") == 1
    path.write_text(text.replace("embedding_size: 16", f"embedding_size: 16, tie_embeddings: {value}"))
    return path


@pytest.mark.parametrize(
    ("value", "overrides", "expected"),
    [
        ("true", [], ("tied", None, 16)),
        ("false", [], ("untied", 16, 16)),
        ("false", ["model.embedding_size=24"], ("untied", 24, 24)),  # as wide as the discriminator's, whatever that is
        ("false", ["model.sharing=gdes"], ("gdes", 16, 16)),
        ("false", ["model.tie_embeddings=true"], ("tied", 16, 16)),
        ("true", ["model.tie_embeddings=false"], ("untied", 16, 16)),
        ("false", ["model.generator_embedding_size=8"], ("untied", 8, 16)),
    ],
)
def test_files_and_overrides_of_earlier_versions(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], value: str, overrides: list[str], expected: tuple[Any, ...]
) -> None:
    model = load_config(str(with_former_key(tiny_yaml, value)), overrides, PretrainConfig).model
    assert (model.sharing, model.generator_embedding_size, model.embedding_size) == expected
    lines = capsys.readouterr().out.splitlines()
    origins = [str(tiny_yaml), *("the command line" for override in overrides if "tie_embeddings" in override)]
    assert [line.partition(": model.tie_embeddings is an older name; read as model.")[0] for line in lines] == origins


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("maybe", r"tiny\.yaml: model\.tie_embeddings is 'maybe'; set model\.sharing to tied, untied or gdes"),
        ("true, sharing: tied", r"model\.tie_embeddings and model\.sharing are both given; remove model\.tie_emb"),
    ],
)
def test_other_values_are_refused(tiny_yaml: Path, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(str(with_former_key(tiny_yaml, value)), [], PretrainConfig)


def test_an_interrupted_run_of_an_earlier_version_resumes(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint and its YAML have the former key, `false`; test_artefacts.py resumes a run with `true`."""
    today = ["model.sharing=untied", "model.generator_embedding_size=16"]
    common = ["trainer.max_duration=4ba", "checkpoints.interval=2ba"]
    uninterrupted = [*today, *common, f"checkpoints.folder={tmp_path / 'uninterrupted'}"]
    expected = weights(pretrain.main(load_config(str(tiny_yaml), uninterrupted, PretrainConfig)))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "build_callbacks", lambda config: [Kill(after=3)])
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(load_config(str(tiny_yaml), [*today, *common], PretrainConfig))
    path = (tmp_path / "run" / "latest-rank0.pt").resolve()
    content = torch.load(path, weights_only=False)
    model = content["state"]["callbacks"]["RunRecord"]["config"]["model"]
    del model["sharing"], model["generator_embedding_size"]
    model["tie_embeddings"] = False
    torch.save(content, path)

    with_former_key(tiny_yaml, "false")
    other = "model.sharing=gdes"
    with pytest.raises(UserError, match=r"written with model\.sharing=untied, but .*=gdes"):
        pretrain.main(load_config(str(tiny_yaml), [other, *common], PretrainConfig))
    trainer = pretrain.main(load_config(str(tiny_yaml), common, PretrainConfig))
    assert trainer.state.timestamp.batch.value == 4
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_an_earlier_version_is_read(
    make_model: Any, tiny_model_config: Any, tmp_path: Path, tied: bool
) -> None:
    """Sizes and weights of both networks; untied, the generator's tables are as wide as the discriminator's."""
    from transformers import BertTokenizerFast, ElectraForMaskedLM

    from electra_composer.checkpoints.weights import tokenizer_files

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(94))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    files = tokenizer_files(BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")))
    sharing = {} if tied else {"sharing": "untied", "generator_embedding_size": 16}
    sizes = tiny_model_config(generator_size=0.75, **sharing)
    model = make_model(sizes)
    former = {key: value for key, value in vars(sizes).items() if key not in ("sharing", "generator_embedding_size")}
    record = {
        "config": {"model": {**former, "tie_embeddings": tied}, "objective": {}, "data": {"max_seq_length": 32}},
        "tokenizer_files": files,
    }
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state": {"model": state, "callbacks": {"RunRecord": record}}}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(str(tmp_path / "x.pt"))
    assert (checkpoint.discriminator, checkpoint.generator) == (
        model.discriminator.config,
        model.encoder_of_generator.config,
    )
    assert "tie_embeddings" not in checkpoint.config["model"]
    export(checkpoint, str(tmp_path / "export"))
    generator = ElectraForMaskedLM.from_pretrained(tmp_path / "export" / "generator")
    table = model.embeddings_of_generator.word.weight[:99]
    assert torch.equal(generator.electra.embeddings.word_embeddings.weight, table)
