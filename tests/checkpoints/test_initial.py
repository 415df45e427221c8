"""Pretraining starts from released networks: transformers' losses, sizes, vocabulary, positions, generators."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from electra_inputs import CLOSE, LENGTH, UNEVEN, noise_of
from shared_fixtures import SPECIAL
from transformers import BertTokenizerFast, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, ElectraModel

from electra_composer.checkpoints.initial import Initial, initialise, read_initial
from electra_composer.checkpoints.weights import Checkpoint
from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.model.adaptation import resize_positions
from electra_composer.model.electra import ElectraForPretraining

Make = Callable[..., Any]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(92)), "##x", "##y"]  # 99
SIZES: dict[str, Any] = {"vocab_size": 99, "embedding_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 40}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _forget_sources() -> None:
    read_initial.cache_clear()


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(words: list[str]) -> BertTokenizerFast:
        path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
        path.write_text("\n".join(words), encoding="utf-8")
        return BertTokenizerFast(vocab_file=str(path))

    return make


@pytest.fixture(scope="module")
def save_pair(make_tokenizer: Make) -> Make:
    """Return `save_pair(folder, tied=True)`; writes `small-discriminator`, 64 wide, and `small-generator`, 32 wide."""

    def save(folder: Path, tied: bool = True) -> Path:
        torch.manual_seed(5)
        wide = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "initializer_range": 0.2}
        narrow = {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 128, "initializer_range": 0.2}
        discriminator = ElectraForPreTraining(ElectraConfig(**SIZES, **NO_DROPOUT, **wide))
        found = ElectraForMaskedLM(ElectraConfig(**{**SIZES, **NO_DROPOUT, **narrow}))
        torch.nn.init.normal_(found.generator_lm_head.bias)
        if tied:
            found.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
        for name, model in (("discriminator", discriminator), ("generator", found)):
            model.save_pretrained(folder / f"small-{name}")
            make_tokenizer(WORDS).save_pretrained(folder / f"small-{name}")
        return folder / "small-discriminator"

    return save


@pytest.fixture(scope="module")
def pair(save_pair: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"))


def build(initial: Initial, vocab_size: int = 99, **changes: Any) -> tuple[ElectraForPretraining, ModelConfig]:
    """Build a model with random weights and the sizes of the networks."""

    sizes = {"generator_size": 0.5, **initial.sizes(), "dropout": 0.0, "attention_dropout": 0.0, **changes}
    config = ModelConfig(**sizes)
    torch.manual_seed(0)
    return ElectraForPretraining(config, ObjectiveConfig(), vocab_size, SPECIAL, LENGTH), config


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_losses_are_those_of_transformers(
    save_pair: Make, make_batch: Make, make_tokenizer: Make, tmp_path: Path, tied: bool
) -> None:
    source = save_pair(tmp_path, tied)
    initial = read_initial(str(source), None)
    assert initial is not None
    model, config = build(initial)
    assert config.sharing == ("tied" if tied else "untied")
    said = initialise(model, config, make_tokenizer(WORDS), initial)
    assert said == f"discriminator from {source}; generator from {tmp_path / 'small-generator'}"
    batch = make_batch(UNEVEN)
    noise = noise_of(model, batch)
    outputs = model.eval()(**batch, noise=noise)

    masked_ids, used = batch["input_ids"].clone(), outputs["masked_weights"] > 0
    positions = outputs["masked_positions"]
    places = torch.arange(len(positions))[:, None].expand_as(positions)[used], positions[used]
    replaced = noise[:, LENGTH : LENGTH + model.slots][used] < 0.85
    labels = torch.full_like(masked_ids, -100)
    labels[places] = batch["input_ids"][places]
    masked_ids[places] = torch.where(replaced, 4, masked_ids[places])
    present = batch["sequence_ids"] > 0
    common = {"attention_mask": present.long(), "token_type_ids": batch["token_type_ids"]}
    generator = ElectraForMaskedLM.from_pretrained(tmp_path / "small-generator").eval()
    discriminator = ElectraForPreTraining.from_pretrained(source).eval()
    with torch.no_grad():
        mlm_loss = generator(masked_ids, labels=labels, **common).loss
        logits = discriminator(outputs["corrupted_ids"], **common).logits
    rtd_loss = F.binary_cross_entropy_with_logits(logits[present], outputs["replaced"][present].float())
    torch.testing.assert_close(outputs["mlm_loss"] / used.sum(), mlm_loss, **CLOSE)
    torch.testing.assert_close(outputs["rtd_loss"] / present.sum(), rtd_loss, **CLOSE)


def test_sizes_follow_from_the_networks(pair: Path) -> None:
    initial = read_initial(str(pair), None)
    assert initial is not None
    assert initial.sizes() == {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "embedding_size": 16,
        "layer_norm_eps": 1e-12,
        "max_positions": 40,
        "generator_size": 0.5,
        "generator_layers": 2,
        "sharing": "tied",
        "tie_encoder": False,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"discriminator in .* has model\.num_layers 2, this model 3; leave the sizes"),
        ({"hidden_size": 32}, r"has model\.hidden_size 64, this model 32"),
        ({"num_heads": 2}, r"has model\.num_heads 4, this model 2"),
        ({"embedding_size": 32}, r"has model\.embedding_size 16, this model 32"),
        ({"layer_norm_eps": 1e-6}, r"has model\.layer_norm_eps 1e-12, this model 1e-06"),
        ({"generator_size": 0.25}, r"generator in .*small-generator has hidden_size 32, this model 16"),
        ({"generator_layers": 1}, r"generator in .* has num_layers 2, this model 1"),
    ],
)
def test_other_sizes_are_refused(pair: Path, make_tokenizer: Make, changes: dict[str, Any], message: str) -> None:
    initial = read_initial(str(pair), None)
    assert initial is not None
    model, config = build(initial, **changes)
    with pytest.raises(UserError, match=message):
        initialise(model, config, make_tokenizer(WORDS), initial)


def test_tying_of_networks_that_differ_is_refused(save_pair: Make, make_tokenizer: Make, tmp_path: Path) -> None:
    initial = read_initial(str(save_pair(tmp_path, tied=False)), None)
    assert initial is not None
    model, config = build(initial, sharing="tied")
    with pytest.raises(UserError, match=r"model.sharing is tied, but .* differ there; set model.sharing=untied"):
        initialise(model, config, make_tokenizer(WORDS), initial)


def test_new_words_start_as_the_mean_of_their_pieces(pair: Path, make_tokenizer: Make) -> None:
    """`##` marks the inside of a word; a word of unknown characters starts as [UNK]."""
    initial = read_initial(str(pair), None)
    assert initial is not None
    assert initial.discriminator is not None
    assert initial.generator is not None
    new = ["w7xy", "##xyx", "é"]
    model, config = build(initial, vocab_size=102)
    initialise(model, config, make_tokenizer([*WORDS, *new]), initial)
    ids = {word: number for number, word in enumerate(WORDS)}
    pieces = [["w7", "##x", "##y"], ["##x", "##y", "##x"], ["[UNK]"]]
    for table, before in (
        (model.embeddings.word.weight, initial.discriminator.embeddings["word.weight"]),
        (model.mlm_head.bias, initial.generator.head["bias"]),  # type: ignore[index]
    ):
        assert torch.equal(table[:99], before[:99])
        for number, parts in enumerate(pieces):
            expected = before[[ids[part] for part in parts]].mean(0)
            torch.testing.assert_close(table[99 + number], expected)
        assert not table[102:].any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS[:-1]], "has 98 entries, .* was trained with 99; convert the text with --tokenizer"),
        ([*WORDS[:50], "other", *WORDS[51:]], "has 'other' as entry 50, .* was trained with 'w45'"),
    ],
)
def test_another_vocabulary_is_refused(pair: Path, make_tokenizer: Make, words: list[str], message: str) -> None:
    initial = read_initial(str(pair), None)
    assert initial is not None
    model, config = build(initial, vocab_size=len(words))
    with pytest.raises(UserError, match=message):
        initialise(model, config, make_tokenizer(words), initial)


def test_more_and_fewer_positions(pair: Path, make_tokenizer: Make) -> None:
    initial = read_initial(str(pair), None)
    assert initial is not None
    model, config = build(initial, max_positions=64, init_positions="interpolate")
    initialise(model, config, make_tokenizer(WORDS), initial)
    before = initial.discriminator.embeddings["position.weight"]  # type: ignore[union-attr]
    assert torch.equal(model.embeddings.position.weight, resize_positions(before, 64, "interpolate"))


@pytest.mark.parametrize(
    ("generator", "size", "said"),
    [
        (None, 1.0, "the lower 1 layers of the discriminator; its head random"),
        ("layers", 1.0, "the lower 1 layers of the discriminator; its head random"),
        ("random", 1.0, "random weights, with the embeddings of the discriminator"),
        (None, 0.5, r"random weights, with the embeddings of the discriminator \(no generator at hand, and"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_discriminator_alone(
    pair: Path, make_tokenizer: Make, tmp_path: Path, generator: str | None, size: float, said: str, tied: bool
) -> None:
    alone = tmp_path / "model"
    alone.symlink_to(pair)
    initial = read_initial(str(alone), generator)
    assert initial is not None
    sharing = {"sharing": "tied"} if tied else {"sharing": "untied", "generator_embedding_size": 16}
    changes = {"generator_size": size, "generator_layers": 1, "num_heads": 4, **sharing}
    model, config = build(initial, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = initialise(model, config, make_tokenizer(WORDS), initial)
    assert line.startswith(f"discriminator from {alone}; generator: ")
    state, theirs = model.state_dict(), initial.discriminator.encoder  # type: ignore[union-attr]
    lower = [name for name in theirs if name.startswith(("project", "layers.0"))]
    assert re.search(said, line)
    for name in lower:
        if "lower" in said:
            assert torch.equal(state[f"generator.{name}"], theirs[name])
        else:
            assert torch.equal(state[f"generator.{name}"], before[f"generator.{name}"])
    own = "embeddings" if tied else "generator_embeddings"
    assert torch.equal(state[f"{own}.word.weight"], state["embeddings.word.weight"])
    assert torch.equal(state["mlm_head.dense.weight"], before["mlm_head.dense.weight"])


def test_layers_that_do_not_fit_are_refused_when_asked_for(pair: Path, make_tokenizer: Make) -> None:
    initial = read_initial(str(pair), "layers")
    assert initial is not None
    model, config = build(initial)
    with pytest.raises(UserError, match=r"init_generator_from is layers, but .* another width or fewer layers"):
        initialise(model, config, make_tokenizer(WORDS), initial)


def test_a_generator_alone(pair: Path, make_tokenizer: Make) -> None:
    initial = read_initial(None, str(pair.parent / "small-generator"))
    assert initial is not None
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "embedding_size": 16, "max_positions": 40}
    model, config = build(initial, **sizes)
    before = model.discriminator.layers[0].up.weight.clone()
    assert initialise(model, config, make_tokenizer(WORDS), initial).startswith("generator from ")
    assert initial.generator is not None
    assert torch.equal(model.embeddings.position.weight, initial.generator.embeddings["position.weight"])
    assert torch.equal(model.discriminator.layers[0].up.weight, before)


def test_a_body_without_a_head(pair: Path, make_tokenizer: Make, tmp_path: Path) -> None:
    """An `ElectraModel` has no head; its own stays random, and that is said."""
    ElectraModel.from_pretrained(pair).save_pretrained(tmp_path / "body")
    make_tokenizer(WORDS).save_pretrained(tmp_path / "body")
    initial = read_initial(str(tmp_path / "body"), str(pair.parent / "small-generator"))
    assert initial is not None
    model, config = build(initial)
    assert f"discriminator from {tmp_path / 'body'}, its head random" in initialise(
        model, config, make_tokenizer(WORDS), initial
    )


def test_exports_and_checkpoints_of_ours_hold_both(
    make_model: Make, tiny_model_config: Make, make_tokenizer: Make, tmp_path: Path
) -> None:
    """A model started from the export of another has its weights."""
    sizes = tiny_model_config()
    model = make_model(sizes)
    tokenizer = make_tokenizer(WORDS)
    config = {"model": vars(sizes), "objective": vars(ObjectiveConfig()), "data": {"max_seq_length": 32}}
    export(Checkpoint("x.pt", model.state_dict(), config, tokenizer), str(tmp_path / "export"))
    for source in (tmp_path / "export", tmp_path / "export" / "discriminator"):
        initial = read_initial(str(source), None)
        assert initial is not None
        again, config = build(initial)
        assert replace(config, generator_layers=None) == sizes
        initialise(again, config, tokenizer, initial)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_a_generator_that_cannot_be_read(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an ELECTRA generator"):
        read_initial(str(pair), str(pair))
    with pytest.raises(UserError, match=r"init_generator_from is layers: those of model.init_from, which is null"):
        read_initial(None, "layers")
