"""Heads of question answering against transformers and the formulas of google-research/electra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qa_tiny import encoder_config, make_split, make_task, make_tokenizer, random_examples
from torch import Tensor
from transformers import ElectraForQuestionAnswering

from electra_composer.model.finetuning import ElectraWithHead
from electra_composer.model.weight_maps import encoder_to_transformers, transformers_config, under
from electra_composer.tasks.encoded import collate
from electra_composer.tasks.model import TaskModel
from electra_composer.tasks.qa_head import JointHead
from electra_composer.tasks.question_answering import QuestionAnswering

TOKENIZER = make_tokenizer()


def make_batch(task: QuestionAnswering, name: str = "train", count: int = 6, seed: int = 0) -> dict[str, Any]:
    split = make_split(name, random_examples(count, seed))
    rows = task.encode(task.tokenize(split, TOKENIZER), TOKENIZER, 32)
    return collate([rows[index] for index in range(len(rows))], pad_id=0)


def make_model(task: QuestionAnswering) -> TaskModel:
    config = encoder_config()
    return TaskModel(ElectraWithHead(config, task.build_head(config), 0.0, task.per_token), task)


@torch.no_grad()
def test_the_linear_head_is_that_of_transformers() -> None:
    task = make_task(stride=8)
    model, batch = make_model(task), make_batch(task)
    config = encoder_config()
    state = model.model.state_dict()
    reference = ElectraForQuestionAnswering(transformers_config(config, pad_id=0)).eval()
    body = encoder_to_transformers(under(state, "embeddings."), under(state, "encoder."), config)
    body = {name if name.startswith("electra.") else f"electra.{name}": value for name, value in body.items()}
    head = {f"qa_outputs.{name}": value for name, value in under(state, "head.").items()}
    missing, unexpected = reference.load_state_dict({**body, **head}, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing)
    logits = model(batch)
    losses = []
    assert batch["start_positions"].count_nonzero() > 3
    for row, length in enumerate(batch["sequence_ids"].sum(1).tolist()):
        outputs = reference(
            batch["input_ids"][row : row + 1, :length],
            token_type_ids=batch["token_type_ids"][row : row + 1, :length],
            start_positions=batch["start_positions"][row : row + 1],
            end_positions=batch["end_positions"][row : row + 1],
        )
        expected = torch.stack([outputs.start_logits[0], outputs.end_logits[0]], dim=-1)
        torch.testing.assert_close(logits[row, :length], expected, rtol=1e-5, atol=1e-6)
        losses.append(outputs.loss)
    # Padding takes no part in the loss.
    torch.testing.assert_close(model.loss(logits, batch), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    kept = task.keep(logits, batch)
    assert [len(each) for each in kept] == batch["sequence_ids"].sum(1).tolist()
    torch.testing.assert_close(torch.from_numpy(kept[1]), logits[1, : len(kept[1])])


def google_loss(head: JointHead, hidden: Tensor, batch: dict[str, Any]) -> Tensor:
    """Compute the loss of one batch as `get_prediction_module` does, with one-hot vectors and tiled features."""
    length = hidden.shape[1]
    mask = batch["sequence_ids"].float() * batch["token_type_ids"].float()
    mask[:, 0] += 1.0
    gelu, one_hot = torch.nn.GELU(), torch.nn.functional.one_hot
    start_logits = head.start(hidden)[..., 0] + 1000.0 * (mask - 1)
    starts = one_hot(batch["start_positions"], length).float()
    start_features = (starts[..., None] * hidden).sum(1, keepdim=True).expand(-1, length, -1)
    end_logits = head.end(gelu(head.end_dense(torch.cat([start_features, hidden], -1))))[..., 0] + 1000.0 * (mask - 1)
    ends = one_hot(batch["end_positions"], length).float()
    start_loss = -(starts * start_logits.log_softmax(-1)).sum(-1)
    end_loss = -(ends * end_logits.log_softmax(-1)).sum(-1)
    losses = (start_loss + end_loss) / 2.0
    if head.no_answer is not None and head.no_answer_dense is not None:
        mean = (start_logits.softmax(-1)[..., None] * hidden).sum(1)
        logit = head.no_answer(gelu(head.no_answer_dense(torch.cat([hidden[:, 0], mean], -1))))[:, 0]
        label = batch["impossible"].float()
        sigmoid = -(label * logit.sigmoid().log() + (1 - label) * (1 - logit.sigmoid()).log())
        losses = losses + 0.5 * sigmoid
    return losses.mean()


@pytest.mark.parametrize("unanswerable", [False, True])
def test_the_joint_loss_is_that_of_google(unanswerable: bool) -> None:
    task = make_task("joint", stride=8, unanswerable=unanswerable)
    model, batch = make_model(task).train(), make_batch(task)
    batch["impossible"] = (torch.arange(len(batch["input_ids"])) % 3 == 0).long()
    hidden: list[Tensor] = []
    model.model.dropout.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    loss = model.loss(model(batch), batch)
    expected = google_loss(model.model.head, hidden[0], batch)
    torch.testing.assert_close(loss, expected)
    weights = list(model.model.head.parameters())
    assert len(weights) == (10 if unanswerable else 6)
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_beam_as_wide_as_the_row_finds_all_valid_answers() -> None:
    """Each answer's log-probability is that of its start plus that of its end given the start, as in training."""
    task = make_task("joint", stride=8, unanswerable=True, max_answer_length=4, n_best=1000)
    model, batch = make_model(task).eval(), make_batch(task, "validation", count=3)
    kept = task.keep(model(batch), batch)
    train = make_batch(task, "train", count=3)
    assert torch.equal(train["input_ids"], batch["input_ids"])
    model.model.train()
    for row, length in enumerate(batch["sequence_ids"].sum(1).tolist()):
        expected = []
        first = int(batch["token_type_ids"][row].argmax())
        for start in batch["may_start"][row].eq(1).nonzero()[:, 0].tolist():
            outputs = model({**train, "start_positions": torch.full_like(train["start_positions"], start)})
            starts, ends = outputs["start"][row].log_softmax(-1), outputs["end"][row].log_softmax(-1)
            for end in range(start, min(start + 4, length - 1)):
                expected.append((start, end, float(starts[start] + ends[end])))
                assert end >= first
        torch.testing.assert_close(kept[row][0, 2].item(), outputs["no_answer"][row].item())
        found = sorted(map(tuple, kept[row][1:].tolist()))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_narrow_beam_keeps_the_most_probable_starts_and_ends() -> None:
    task = make_task("joint", stride=8, unanswerable=False, n_best=2)
    every = make_task("joint", stride=8, unanswerable=False, n_best=1000)
    model, batch = make_model(task).eval(), make_batch(task, "validation")
    narrow = task.keep(model(batch), batch)
    model.model.head.beam = 1000
    wide = every.keep(model(batch), batch)
    for few, all_of_row in zip(narrow, wide, strict=True):
        assert 1 <= len(few) - 1 <= 4
        spans = {tuple(span[:2]): span[2] for span in all_of_row[1:].tolist()}
        assert {tuple(span[:2]): span[2] for span in few[1:].tolist()} == pytest.approx(
            {tuple(span[:2]): spans[tuple(span[:2])] for span in few[1:].tolist()}
        )
        starts = {start for start, _ in spans}
        if len(starts) > 2:
            assert len({span[0] for span in few[1:].tolist()}) == 2
