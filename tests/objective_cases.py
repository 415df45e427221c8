"""Objectives for tests, and their losses and statistics in fp64 and plain PyTorch, written from the papers' formulas.

The hidden states are those of the networks, which other tests compare with transformers'; what an objective does with
them is written out: heads, softmax, labels, noise probabilities, sums. Masked positions are those of the masker.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.masking import split_noise

FROZEN = {"init_from": "not read by tests"}

# name → (keys of the objective, keys of the model)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "electra": ({}, {}),
    "electra, switches": (
        {
            **{"gen_weight": 2.0, "disc_weight": 7.0, "temperature": 0.7, "disallow_correct": True},
            **{"mlm_label_smoothing": 0.1, "rtd_label_smoothing": 0.2, "mask_style": "bert", "mask_draw": "bernoulli"},
        },
        {"sharing": "gdes"},
    ),
    "frozen": ({"generator": "frozen", "temperature": 1.5}, {"sharing": "untied", **FROZEN}),
    "frozen, gdes": ({"generator": "frozen"}, {"sharing": "gdes", **FROZEN}),
    "uniform": ({"generator": "uniform", "disallow_correct": True}, {}),
    "unigram": ({"generator": "unigram", "temperature": 2.0, "mask_draw": "with_replacement"}, {}),
    "two_tower": ({"generator": "two_tower", "mlm_label_smoothing": 0.1, "mask_draw": "with_replacement"}, {}),
    "mlm": ({"kind": "mlm"}, {}),
    "mlm, switches": ({"kind": "mlm", "mlm_label_smoothing": 0.1, "mask_style": "electra"}, {"embedding_size": 32}),
    "replace_mlm": ({"kind": "replace_mlm", "mlm_label_smoothing": 0.1}, {}),
    "replace_mlm, unigram": ({"kind": "replace_mlm", "generator": "unigram", "mlm_label_smoothing": 0.1}, {}),
    "replace_mlm, frozen": (
        {"kind": "replace_mlm", "generator": "frozen", "mlm_label_smoothing": 0.1},
        {"sharing": "untied", **FROZEN},
    ),
    "all_tokens_mlm": ({"kind": "all_tokens_mlm", "gen_weight": 3.0, "mlm_label_smoothing": 0.1}, {}),
    "all_tokens_mlm, towers": ({"kind": "all_tokens_mlm", "generator": "two_tower"}, {"sharing": "gdes"}),
    "all_tokens_mlm, uniform": ({"kind": "all_tokens_mlm", "generator": "uniform"}, {}),
    "electra_15": ({"kind": "electra_15", "rtd_label_smoothing": 0.2, "rtd_label_smoothing_style": "symmetric"}, {}),
    "electra_15, repeats": ({"kind": "electra_15", "mask_draw": "with_replacement"}, {}),
    "electric": ({"kind": "electric", "gen_weight": 2.0, "disc_weight": 7.0}, {}),
    "electric, untied": ({"kind": "electric", "mask_draw": "bernoulli", "mask_prob": 0.3}, {"sharing": "untied"}),
    "electric, unigram": ({"kind": "electric", "generator": "unigram"}, {}),
}


def word_counts(vocab_size: int) -> Tensor:
    """Counts for `generator: unigram`, some of them 0; the words of the tests' batches are frequent."""
    counts = torch.arange(vocab_size) % 11 * 3
    counts[5:12] += 500
    return counts


def linear(inputs: Tensor, layer: nn.Linear) -> Tensor:
    return inputs @ layer.weight.T + layer.bias


def gelu(inputs: Tensor) -> Tensor:
    return 0.5 * inputs * (1 + torch.erf(inputs / math.sqrt(2)))


def layer_norm(inputs: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = inputs - inputs.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(-1, keepdim=True).log()


def of_token(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[..., None]).squeeze(-1)


def cross_entropy(log_p: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * of_token(log_p, targets) - smoothing * log_p.mean(-1)


class Twin:
    """What `model` should return for a batch.

    Args:
        model: perturbed; the computation is of a copy in fp64, :attr:`model`.
        batch: with `noise`, and `mask_counts` if positions are drawn by `bernoulli`.
        corrupted_ids: of the model's forward.

    Attributes:
        sums: of the losses, by their names, with gradient.
        stats: expected statistics.
        samples: expected samples `[used slots]` by the inverse CDF.
        used: rows and positions of the masked tokens, with repeats.
    """

    def __init__(self, model: ElectraForPretraining, batch: dict[str, Tensor], corrupted_ids: Tensor):
        self.model, self.objective = copy.deepcopy(model).double(), model.objective
        self.ids, self.corrupted, self.batch = batch["input_ids"], corrupted_ids, batch
        self.tokens = batch["sequence_ids"] > 0
        *mask_noise, sample_noise = split_noise(batch["noise"], model.slots)
        counts = batch.get("mask_counts")
        masked = model.masker.mask(self.ids, batch["sequence_ids"], counts, *mask_noise)
        in_use = masked.weights > 0
        rows = torch.arange(len(self.ids))[:, None].expand_as(masked.positions)
        self.used = (rows[in_use], masked.positions[in_use])
        self.originals = self.ids[self.used]
        # A position drawn twice has the sample of its first slot.
        first = sample_noise if masked.first is None else sample_noise.gather(1, masked.first)
        self.noise = first[in_use].double()
        self.sums: dict[str, Tensor] = {}
        self.stats = {"masked": float(len(self.originals)), "tokens": float(self.tokens.sum())}
        self.samples = self.originals
        self.log_q: Tensor | None = None
        if self.objective.kind == "mlm":
            self.predict("mlm", masked.input_ids, self.used)
            return
        self.generate(masked.input_ids)
        self.stats["sampled_correct"] = float((corrupted_ids[self.used] == self.originals).sum())
        if self.objective.kind in ("electra", "electra_15", "electric"):
            self.detect()
        else:
            everywhere = torch.nonzero(self.tokens).unbind(1)
            self.predict("lm", corrupted_ids, everywhere if self.objective.kind == "all_tokens_mlm" else self.used)

    def encode(self, encoder: nn.Module, embeddings: nn.Module, ids: Tensor) -> Tensor:
        pattern = pattern_of(self.batch["sequence_ids"], "sdpa")
        return encoder(embeddings(ids, self.batch["token_type_ids"], self.batch["position_ids"]), pattern)

    def log_probabilities(self, hidden: Tensor, head: nn.Module, table: Tensor) -> Tensor:
        size = self.model.vocab_size
        return log_softmax(layer_norm(gelu(linear(hidden, head.dense)), head.norm) @ table[:size].T + head.bias[:size])

    def generate(self, masked_ids: Tensor) -> None:
        """Section 2 of the paper; `_get_cloze_outputs` of google-research/electra for two towers."""
        model, objective, embeddings = self.model, self.objective, None
        if objective.generator in ("uniform", "unigram"):
            of_all = model.distribution.probabilities.log().expand(*self.ids.shape, -1)
            self.log_q = of_token(of_all, self.corrupted)
            self.sample(of_all[self.used], 1.0)
            return
        embeddings = model.embeddings_of_generator
        if objective.generator == "two_tower":
            hidden = model.towers(embeddings, self.ids, *(self.batch[name] for name in list(self.batch)[1:4]))
            log_p = self.log_probabilities(hidden, model.mlm_head, embeddings.word.weight)
            self.log_q = of_token(log_p, self.corrupted).detach()
            self.sample(log_p[self.used], objective.temperature)
            may_mask = self.tokens & (self.ids != 2) & (self.ids != 3) & (self.ids != 4)
            losses = cross_entropy(log_p[may_mask], self.ids[may_mask], objective.mlm_label_smoothing)
            self.count("cloze", losses, (log_p.argmax(-1) == self.ids)[may_mask])
            self.stats["candidates"] = float(may_mask.sum())
            return
        hidden = self.encode(model.encoder_of_generator, embeddings, masked_ids)[self.used]
        log_p = self.log_probabilities(hidden, model.mlm_head, embeddings.word.weight)
        self.sample(log_p, objective.temperature)
        losses = cross_entropy(log_p, self.originals, objective.mlm_label_smoothing)
        self.count("mlm", losses, log_p.argmax(-1) == self.originals)

    def sample(self, log_p: Tensor, temperature: float) -> None:
        p = (log_p.detach() / temperature).exp()
        if self.objective.disallow_correct:
            p = p.scatter(-1, self.originals[:, None], 0.0)
        ends = p.cumsum(-1) / p.sum(-1, keepdim=True)
        self.samples = (ends <= self.noise[:, None]).sum(-1)

    def count(self, name: str, losses: Tensor, correct: Tensor) -> None:
        self.sums[name] = losses.sum()
        self.stats |= {f"{name}_loss_sum": losses.sum().item(), f"{name}_correct": float(correct.sum())}

    def predict(self, name: str, read: Tensor, places: tuple[Tensor, ...]) -> None:
        """Section 3.4: the originals at some places; with a copy mechanism D [x = t] + (1 - D) p(t)."""
        model, embeddings, targets = self.model, self.model.embeddings, self.ids[places]
        if hasattr(embeddings, "word_delta"):
            table = model.generator_embeddings.word.weight.detach() + embeddings.word_delta
        else:
            table = embeddings.word.weight
        hidden = self.encode(model.discriminator, embeddings, read)[places]
        log_p = self.log_probabilities(hidden, model.lm_head, table)
        losses, predicted = cross_entropy(log_p, targets, self.objective.mlm_label_smoothing), log_p.argmax(-1)
        if self.objective.kind == "all_tokens_mlm":
            copy_probability = torch.sigmoid(linear(hidden, model.copy_head)).squeeze(-1)
            same, copies = (read[places] == targets).double(), copy_probability > 0.5
            losses = -torch.log(copy_probability * same + (1 - copy_probability) * of_token(log_p, targets).exp())
            predicted = torch.where(copies, read[places], predicted)
            self.stats["copied"] = float(copies.sum())
        self.count(name, losses, predicted == targets)
        if name == "lm":
            self.stats["predicted"] = float(len(targets))

    def detect(self) -> None:
        """Section 2; section 3.4 for the masked positions alone; section 2.2 of Electric for its logits and labels."""
        model, objective = self.model, self.objective
        inner = gelu(linear(self.encode(model.discriminator, model.embeddings, self.corrupted), model.rtd_head.dense))
        logits, labels = linear(inner, model.rtd_head.out).squeeze(-1), self.corrupted != self.ids
        if objective.kind == "electric":
            logits = logits + self.log_q + math.log(objective.mask_prob) - math.log(1 - objective.mask_prob)
            labels = torch.zeros_like(labels)
            labels[self.used] = True
        places = self.used if objective.kind == "electra_15" else torch.nonzero(self.tokens).unbind(1)
        self.rtd_logits, self.labels = logits[places].detach(), labels[places]
        targets, smoothing = self.labels.double(), objective.rtd_label_smoothing
        if objective.rtd_label_smoothing_style == "symmetric":
            targets = targets * (1 - smoothing) + smoothing / 2
        else:
            targets = torch.where(self.labels, 1.0, smoothing).double()
        p = torch.sigmoid(logits[places])
        losses = -(targets * p.log() + (1 - targets) * (1 - p).log())
        guess = self.rtd_logits > 0
        self.sums["rtd"] = losses.sum()
        self.stats |= {
            "replaced": float(self.labels.sum()),
            "true_positive": float((guess & self.labels).sum()),
            "false_positive": float((guess & ~self.labels).sum()),
            "false_negative": float((~guess & self.labels).sum()),
            "true_negative": float((~guess & ~self.labels).sum()),
            "rtd_loss_sum": losses.sum().item(),
        }

    def means(self) -> dict[str, Tensor]:
        """The losses, each over its own tokens, and `total`."""
        objective, stats = self.objective, self.stats
        everywhere = objective.kind in ("electra", "electric", "all_tokens_mlm")
        of_discriminator = stats["tokens"] if everywhere else stats["masked"]
        over = {"mlm": stats["masked"], "cloze": stats.get("candidates"), "lm": of_discriminator}
        over["rtd"] = of_discriminator
        means = {name: value / over[name] for name, value in self.sums.items()}
        of_generator = 1.0 if objective.kind == "mlm" else objective.gen_weight
        weights = {"mlm": of_generator, "cloze": of_generator, "lm": 1.0, "rtd": objective.disc_weight}
        if objective.generator == "frozen":
            weights["mlm"] = 0.0
        return {**means, "total": sum(weights[name] * value for name, value in means.items())}
