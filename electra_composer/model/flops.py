"""Floating-point operations of a training step.

These are model FLOPs as defined by PaLM (arXiv 2204.02311, appendix B), independent of the implementation. Networks are
counted separately, each with its own hidden size h, feed-forward size f and layers n. With e the embedding size, v the
vocabulary, T the non-padding tokens of the batch, M the masked ones, C those that may be masked, S the sum over its
examples of their length squared::

    encoder        6 · T · (n · (4h² + 2hf) + eh)  +  12 · n · h · S     (eh: only where e and h differ)
    MLM head       6 · M · (h · e + e · v)                               (h of its network)
    two towers     two encoders with (S + T) / 2 in place of S, and 6 · C · (2h · e + e · v)
    RTD head       6 · T · (h · h + h)
    all tokens     6 · T · (h · e + e · v + h)                           (MLM head and copy probability)

A multiply-add is two operations, and backward is twice the forward: hence 6 per weight of a matrix product, and 12 for
the two products of attention; a frozen generator has a third of them. Not counted: padding, attention to other examples
of a row, unused slots, recomputation, embedding lookups, LayerNorm, softmax, sampling and the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.encoder import EncoderConfig


def step_flops(model: ElectraForPretraining, counts: Mapping[str, int], squared_lengths: int) -> int:
    """Operations of one training step.

    Args:
        model: the objective with its networks.
        counts: `masked`, `tokens` and `candidates` of the batch.
        squared_lengths: S.
    """
    sizes, tokens = model.discriminator.config, counts["tokens"]
    total = encoder_flops(sizes, tokens, squared_lengths) + _generator_flops(model, counts, squared_lengths)
    if model.rtd_head is not None:
        return total + 6 * tokens * sizes.hidden_size * (sizes.hidden_size + 1)
    if model.copy_head is not None:
        return total + head_flops(sizes, sizes.hidden_size, tokens) + 6 * tokens * sizes.hidden_size
    return total + head_flops(sizes, sizes.hidden_size, counts["masked"])


def _generator_flops(model: ElectraForPretraining, counts: Mapping[str, int], squared_lengths: int) -> int:
    if model.mlm_head is None:
        return 0
    sizes = model.config_of_generator
    if model.towers is not None:
        # Causal: of S pairs of tokens in the examples, (S + T) / 2 in each tower.
        causal = encoder_flops(sizes, counts["tokens"], (squared_lengths + counts["tokens"]) // 2)
        return 2 * causal + head_flops(sizes, model.towers.output_size, counts["candidates"])
    encoder = encoder_flops(sizes, counts["tokens"], squared_lengths)
    total = encoder + head_flops(sizes, sizes.hidden_size, counts["masked"])
    return total // 3 if model.objective.generator == "frozen" else total


def head_flops(config: EncoderConfig, width: int, positions: int) -> int:
    """Operations of an MLM head that reads hidden states of this width, and of its product with the embeddings."""
    return 6 * positions * config.embedding_size * (width + config.vocab_size)


def encoder_flops(config: EncoderConfig, tokens: int, squared_lengths: int) -> int:
    """Operations of forward and backward of one encoder; see `ElectraPretraining.flops_per_batch`.

    Args:
        config: sizes of the encoder.
        tokens: number of tokens without padding.
        squared_lengths: sum over the examples of their squared lengths.
    """
    hidden = config.hidden_size
    layer_weights = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    projection = config.embedding_size * hidden if config.embedding_size != hidden else 0
    products = 6 * tokens * (config.num_layers * layer_weights + projection)
    # Scores and weighted values of a layer: two products of 2 · length² · hidden operations, three times over.
    attention = 12 * config.num_layers * hidden * squared_lengths
    return products + attention
