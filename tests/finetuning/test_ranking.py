"""WNLI as ranking of candidates: encoding, loss and decision compared with loops; the command on tiny files."""

from __future__ import annotations

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from glue_tiny import settings, write_source, write_wnli
from tiny import ROOT
from transformers import BertTokenizerFast, ElectraModel

from electra_composer.checkpoints.weights import load_source
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.loader import collate_ranked, split_ranked
from electra_composer.finetuning.ranker import build_ranker, ranking_logits, ranking_loss
from electra_composer.finetuning.ranking import encode_ranked
from electra_composer.finetuning.tasks import TASKS
from electra_composer.glue import main
from electra_composer.glue_config import GlueConfig, GlueModelConfig

WNLI = TASKS["wnli"]
PREMISE = "Ann saw the dog because it was very big ."
EXAMPLES = [
    Example((PREMISE, "the dog was very big ."), 1),
    Example((PREMISE, "Ann was very big ."), 0),
    Example(("Nothing here .", "the dog was big ."), 0),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = sorted({word.lower() for example in EXAMPLES for text in example.texts for word in text.split()})
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    return BertTokenizerFast(vocab_file=str(path))


def words_of(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_a_row_per_candidate_that_knows_where_it_is(tokenizer):
    encoded = encode_ranked(WNLI, EXAMPLES, tokenizer, 32, train=False)
    first = encoded[0]
    texts = [words_of(tokenizer, row.input_ids) for row in first.rows]
    assert texts[0] == "[CLS] ann saw the dog because the dog was very big . [SEP]"
    assert "[CLS] ann saw the dog because ann was very big . [SEP]" in texts
    assert words_of(tokenizer, first.rows[0].input_ids[first.rows[0].start : first.rows[0].end]) == "the dog"
    assert words_of(tokenizer, encoded[1].rows[0].input_ids) == texts[1]
    # Without a pronoun, the hypothesis is the only candidate.
    (alone,) = encoded[2].rows
    assert words_of(tokenizer, alone.input_ids[alone.start : alone.end]) == "the dog was big ."
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [1, 0, 0]


def test_training_keeps_what_gives_a_loss(tokenizer):
    assert [len(item.rows) for item in encode_ranked(WNLI, EXAMPLES, tokenizer, 32, train=True)] == [2]
    with pytest.raises(UserError, match="wnli=classification"):
        encode_ranked(WNLI, EXAMPLES[1:], tokenizer, 32, train=True)


@pytest.mark.parametrize("length", [4, 5, 7, 9])
def test_what_is_far_from_the_candidate_is_cut(tokenizer, length):
    for row in encode_ranked(WNLI, EXAMPLES[:1], tokenizer, length, train=False)[0].rows:
        assert len(row.input_ids) <= length
        assert (row.input_ids[0], row.input_ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert 1 <= row.start < row.end < len(row.input_ids)
    with pytest.raises(UserError, match="needs at least 4"):
        encode_ranked(WNLI, EXAMPLES[:1], tokenizer, 3, train=False)


def test_a_batch_and_its_parts(tokenizer):
    encoded = encode_ranked(WNLI, EXAMPLES, tokenizer, 32, train=False)
    batch = collate_ranked([encoded[i] for i in (2, 0, 1)], tokenizer.pad_token_id)
    assert batch["example_ids"].tolist() == [0, 1, 1, 2, 2]
    assert batch["indices"].tolist() == [2, 0, 1]
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["num_tokens"] == int(batch["sequence_ids"].sum())
    row = encoded[0].rows[1]
    assert batch["input_ids"][2][batch["candidates"][2] == 1].tolist() == row.input_ids[row.start : row.end].tolist()
    parts = split_ranked(batch, 2)
    assert [part["example_ids"].tolist() for part in parts] == [[0, 1, 1], [0, 0]]
    assert [part["indices"].tolist() for part in parts] == [[2, 0], [1]]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])


def test_loss_and_decision_against_loops():
    rng = np.random.default_rng(0)
    counts, labels = [3, 1, 4, 2], [1, 1, 0, 1]
    scores = [rng.normal(size=count) for count in counts]
    losses, margins = [], []
    for group, label in zip(scores, labels, strict=True):
        # -log p(original) of the first, -log p(replaced) of the others
        terms = [math.log1p(math.exp(group[0])), *(math.log1p(math.exp(-other)) for other in group[1:])]
        if label:
            losses.append(sum(terms) / len(terms))
        margins.append((min(group[1:]) if len(group) > 1 else 0.0) - group[0])
    flat = torch.tensor(np.concatenate(scores), dtype=torch.float32)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    loss = ranking_loss(flat, ids, torch.tensor(labels))
    torch.testing.assert_close(loss, torch.tensor(sum(losses) / 3, dtype=torch.float32))
    logits = ranking_logits(flat, ids, 4)
    torch.testing.assert_close(logits[:, 1], torch.tensor(margins, dtype=torch.float32))
    assert logits.argmax(1).tolist() == [int(margin > 0) for margin in margins]
    assert ranking_loss(flat, ids, torch.zeros(4, dtype=torch.long)) == 0.0


def test_scores_are_those_of_transformers(tmp_path, tokenizer):
    from transformers import ElectraForPreTraining

    folder = write_source(tmp_path / "source")
    ranker = build_ranker(load_source(folder), WNLI, GlueModelConfig(source=folder)).eval()
    reference = ElectraForPreTraining.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0]])
    mask = (ids > 0).long()
    candidates = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    batch = {
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(5).expand(2, 5),
        "sequence_ids": mask,
        "candidates": candidates,
    }
    with torch.no_grad():
        theirs = reference(input_ids=ids, attention_mask=mask).logits
        expected = (theirs * candidates).sum(1) / candidates.sum(1)
        torch.testing.assert_close(ranker.scores(batch), expected, atol=1e-5, rtol=1e-5)
        # Without an attention mask, as in electra_pytorch, the score of the shorter candidate depends on the padding.
        of_seed = (reference(input_ids=ids).logits * candidates).sum(1) / candidates.sum(1)
        torch.testing.assert_close(of_seed[0], expected[0], atol=1e-5, rtol=1e-5)
        assert (of_seed[1] - expected[1]).abs() > 1e-4


def test_the_command_ranks_and_predicts(tmp_path):
    source, data = write_source(tmp_path / "source"), write_wnli(tmp_path / "data")
    words = [*settings(source, data, tmp_path), "tasks=[wnli]", "wnli=coreference", "predict.enabled=true"]
    config = load_config(
        str(ROOT / "yamls/glue.yaml"), [*words, "trainer.max_duration=8ep", "data.max_seq_length=32"], GlueConfig
    )
    results = main(config)
    (run,) = results["tasks"]["wnli"]["runs"]
    assert run["train_examples"] == 12  # those with a right candidate
    assert run["dev_examples"] == 9
    # Every right candidate is `film`. Eight epochs are enough to learn that `plot` is less likely.
    assert run["score"] == 100.0
    with zipfile.ZipFile(tmp_path / "run/submission.zip") as archive:
        lines = archive.read("WNLI.tsv").decode().split()
    assert lines == ["index", "prediction", *(word for i in range(7) for word in (str(i), str(i % 2)))]
    report = (tmp_path / "run/results.md").read_text()
    assert "ranked by the discriminator" in report
    assert json.loads((tmp_path / "run/results.json").read_text())["settings"]["wnli"] == "coreference"


def test_a_source_without_the_head_is_refused(tmp_path):
    source, data = write_source(tmp_path / "source", ElectraModel), write_wnli(tmp_path / "data")
    words = [*settings(source, data, tmp_path), "tasks=[wnli]", "wnli=coreference"]
    config = load_config(str(ROOT / "yamls/glue.yaml"), words, GlueConfig)
    with pytest.raises(UserError, match=r"no discriminator head.*wnli=classification"):
        main(config)
