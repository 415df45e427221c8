"""`model.init_from` between the kinds of `model.sharing`, from checkpoints and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from electra_inputs import LENGTH, UNEVEN, noise_of
from shared_fixtures import SPECIAL
from transformers import BertTokenizerFast

from electra_composer.checkpoints.initial import initialise, read_initial
from electra_composer.checkpoints.weights import Checkpoint, load_source, read_checkpoint, tokenizer_files
from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.weight_maps import discriminator_embeddings

Make = Callable[..., Any]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(94))]  # 99


@pytest.fixture(autouse=True)
def _forget_sources() -> None:
    read_initial.cache_clear()


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))


@pytest.fixture
def run(make_model: Make, tiny_model_config: Make, tokenizer: BertTokenizerFast, tmp_path: Path) -> Make:
    """Return `run(sharing="gdes", …)`; writes a checkpoint, returns its path and its model."""

    def write(**sizes: Any) -> tuple[str, ElectraForPretraining]:
        config = tiny_model_config(**sizes)
        model = make_model(config)
        record = {
            "config": {"model": vars(config), "objective": {}, "data": {"max_seq_length": 32}},
            "tokenizer_files": tokenizer_files(tokenizer),
        }
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state": {"model": state, "callbacks": {"RunRecord": record}}}, tmp_path / "latest-rank0.pt")
        return str(tmp_path / "latest-rank0.pt"), model

    return write


def start(source: str, tokenizer: Any, generator: str | None = None, **changes: Any) -> ElectraForPretraining:
    """Build a model of the sizes of `source`, but for `changes`, and start it from there."""
    initial = read_initial(source, generator)
    assert initial is not None
    sizes = {"generator_size": 0.5, **initial.sizes(), "dropout": 0.0, "attention_dropout": 0.0, **changes}
    config = ModelConfig(**sizes)
    torch.manual_seed(9)
    model = ElectraForPretraining(config, ObjectiveConfig(), len(tokenizer), SPECIAL, LENGTH)
    initialise(model, config, tokenizer, initial)
    return model


def outputs(model: ElectraForPretraining, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    found = model.eval()(**batch, noise=noise_of(model, batch))
    return found["rtd_logits"], found["mlm_features"]


@pytest.mark.parametrize(
    "sizes", [{"sharing": "gdes"}, {"sharing": "untied"}, {"sharing": "untied", "generator_embedding_size": 24}, {}]
)
def test_the_sharing_is_that_of_the_checkpoint_and_the_state_is_its(
    run: Make, tokenizer: BertTokenizerFast, sizes: dict[str, Any]
) -> None:
    """To the bit: also the differences, which could not be recovered from rounded sums."""
    source, model = run(**sizes)
    state = start(source, tokenizer).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_an_export_of_disentangled_embeddings_is_untied(
    run: Make, tokenizer: BertTokenizerFast, tmp_path: Path, make_batch: Make
) -> None:
    source, model = run(sharing="gdes")
    export(read_checkpoint(source), str(tmp_path / "export"))
    initial = read_initial(str(tmp_path / "export"), None)
    assert initial is not None
    assert (initial.sizes()["sharing"], initial.sizes()["generator_embedding_size"]) == ("untied", 16)
    again = start(str(tmp_path / "export"), tokenizer)
    for found, expected in zip(*(outputs(one, make_batch(UNEVEN)) for one in (again, model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [{}, {"sharing": "untied", "generator_embedding_size": 16}])
def test_other_kinds_become_disentangled(
    run: Make, tokenizer: BertTokenizerFast, make_batch: Make, before: dict[str, Any]
) -> None:
    """The difference is the discriminator's tables minus the generator's: zero if they were tied."""
    source, model = run(**before)
    again = start(source, tokenizer, sharing="gdes")
    for found, expected in zip(*(outputs(one, make_batch(UNEVEN)) for one in (again, model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    delta = again.state_dict()["embeddings.word_delta"]
    base = model.embeddings_of_generator.word.weight
    assert torch.equal(delta, model.embeddings.tables()[0] - base)
    assert delta.any() == bool(before)
    assert not delta[99:].any()


def test_disentangled_embeddings_cannot_be_tied(run: Make, tokenizer: BertTokenizerFast) -> None:
    source, _ = run(sharing="gdes")
    with pytest.raises(UserError, match=r"model.sharing is tied, but .* differ there; set model.sharing=untied"):
        start(source, tokenizer, sharing="tied")
    state = start(source, tokenizer, sharing="untied", generator_embedding_size=16).state_dict()
    assert torch.equal(state["embeddings.word.weight"], start(source, tokenizer).embeddings.tables()[0])


def test_the_width_of_the_generators_embeddings_must_be_its_own(run: Make, tokenizer: BertTokenizerFast) -> None:
    source, _ = run(generator_size=0.75)
    with pytest.raises(UserError, match=r"are 16 wide, those of this model 24; set .*generator_embedding_size=16"):
        start(source, tokenizer, sharing="untied")


@pytest.mark.parametrize(
    ("changes", "copied"),
    [
        ({"sharing": "gdes"}, True),
        ({"sharing": "untied", "generator_embedding_size": 16}, True),
        ({"sharing": "untied", "generator_size": 0.75}, False),
    ],
)
def test_a_discriminator_alone(run: Make, tokenizer: BertTokenizerFast, changes: dict[str, Any], copied: bool) -> None:
    """Its tables are the sums. The generator's embeddings begin as they are if they have their width."""
    source, model = run(sharing="gdes")
    again = start(source, tokenizer, "random", **changes)
    table, expected = again.embeddings_of_generator.word.weight, model.embeddings.tables()[0]
    assert torch.equal(again.embeddings.tables()[0], expected)
    assert (table.shape == expected.shape and torch.equal(table, expected)) == copied


def test_a_generator_alone_gives_both_their_embeddings(run: Make, tokenizer: BertTokenizerFast) -> None:
    source, model = run()
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "embedding_size": 16, "max_positions": 40}
    state = start(None, tokenizer, source, sharing="gdes", **sizes).state_dict()  # type: ignore[arg-type]
    for name in ("word.weight", "norm.weight"):
        assert torch.equal(state[f"generator_embeddings.{name}"], model.state_dict()[f"embeddings.{name}"])
    assert torch.equal(state["embeddings.norm.bias"], model.state_dict()["embeddings.norm.bias"])
    assert not state["embeddings.word_delta"].any()


def test_new_words_and_positions_of_differences(run: Make, tmp_path: Path) -> None:
    """A new word's tables are the means of those of its pieces, in sum and in difference; positions repeat."""
    source, model = run(sharing="gdes")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "w1 w2"]), encoding="utf-8")
    longer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    again = start(source, longer, max_positions=48)
    before, after = model.state_dict(), again.state_dict()
    for name in ("embeddings.word_delta", "generator_embeddings.word.weight"):
        torch.testing.assert_close(after[name][99], before[name][[6, 7]].mean(0))
        assert not after[name][100:].any()
    assert torch.equal(after["embeddings.position_delta"][40:], before["embeddings.position_delta"][:8])


def test_finetuning_takes_the_sum(run: Make) -> None:
    source, model = run(sharing="gdes")
    pretrained = load_source(source)
    word, position, token_type = (table.detach() for table in model.embeddings.tables())
    assert torch.equal(pretrained.weights["embeddings.word.weight"], word)
    assert torch.equal(pretrained.weights["embeddings.position.weight"], position)
    assert torch.equal(pretrained.weights["embeddings.token_type.weight"], token_type)
    assert not [name for name in pretrained.weights if "delta" in name]
    assert discriminator_embeddings(model.state_dict()).keys() == {
        name.removeprefix("embeddings.") for name in pretrained.weights if name.startswith("embeddings.")
    }


def test_an_older_reader_finds_no_table(run: Make) -> None:
    """A reader that knows no differences misses `embeddings.word.weight` instead of taking the difference for it."""
    _, model = run(sharing="gdes")
    assert "embeddings.word.weight" not in model.state_dict()


def test_a_checkpoint_class_builds_its_model(run: Make, make_batch: Make) -> None:
    source, model = run(sharing="gdes")
    checkpoint: Checkpoint = read_checkpoint(source)
    checkpoint.config |= {"objective": {}, "data": {"max_seq_length": LENGTH}}
    for found, expected in zip(
        *(outputs(m, make_batch(UNEVEN)) for m in (checkpoint.build_model(), model)), strict=True
    ):
        assert torch.equal(found, expected)
