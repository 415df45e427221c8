"""Convert a linear head to the classification head of transformers, exactly.

transformers' `ElectraForSequenceClassification` computes `out_proj(gelu(dense(x)))` of the last hidden state of
`[CLS]`, where google-research/electra has one linear layer `W x + b`. Without dropout, in evaluation, the same is
computed by either of these choices of the weights:

Pairs, for 2 · outputs ≤ hidden: dense gives `z = W x + b` and `-z`, and out_proj their difference, since
`gelu(z) - gelu(-z) = z Φ(z) + z Φ(-z) = z` with the distribution function Φ of the normal distribution. Rounding is
that of the linear layer, in any precision.

Shift, for more outputs: dense gives `A x + a + k`, with k so large that GELU is the identity in fp32, and out_proj
multiplies by B and subtracts `B k`. For outputs ≤ hidden, A is W and B the identity, with an error of about 2e-6; for
more, A is the identity and B is W, with an error of about 3e-5 of logits, 1e-5 of probabilities, since fp32 adds up
`B (A x + k)` and subtracts `B k`. Precisions below fp32 cannot be used. The bound of `A x`: the last hidden state is
`x = γ n + β`, the output of a LayerNorm, and the squares of n add up to at most `hidden`. Hence
`|A x + a| ≤ ‖A γ‖ sqrt(hidden) + |A β + a|` in each row; k is this plus 6, since `6 Φ(-6) = 6e-9` is below the
resolution of fp32 at 6.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_composer.model.weight_maps import State

IDENTITY_FROM = 6.0  # GELU is the identity in fp32 for larger numbers


def classifier_of_linear(linear: State, norm: State) -> State:
    """Return weights of transformers' classification head that computes what a linear head does.

    Args:
        linear: `weight [outputs, hidden]` and `bias [outputs]`.
        norm: `weight [hidden]` and `bias [hidden]` of the last LayerNorm of the encoder.

    Returns:
        `dense.weight`, `dense.bias`, `out_proj.weight`, `out_proj.bias`, fp32.
    """
    weight, bias = linear["weight"].double(), linear["bias"].double()
    outputs, hidden = weight.shape
    if 2 * outputs <= hidden:
        identity = torch.eye(outputs, dtype=weight.dtype)
        dense, dense_bias = torch.cat([weight, -weight]), torch.cat([bias, -bias])
        out_proj, out_bias = torch.cat([identity, -identity], dim=1), torch.zeros_like(bias)
    else:
        identity = torch.eye(min(outputs, hidden), dtype=weight.dtype)
        if outputs <= hidden:
            dense, inner, out_proj, outer = weight, bias, identity, torch.zeros_like(bias)
        else:
            dense, inner, out_proj, outer = identity, torch.zeros(hidden, dtype=weight.dtype), weight, bias
        gamma, beta = norm["weight"].double(), norm["bias"].double()
        bound = (dense * gamma).norm(dim=1) * math.sqrt(hidden) + (dense @ beta + inner).abs()
        dense_bias = (inner + bound + IDENTITY_FROM).float().double()  # what is subtracted is what is stored
        out_bias = outer - out_proj @ (dense_bias - inner)
    unused = hidden - len(dense)
    dense, dense_bias, out_proj = (
        F.pad(dense, (0, 0, 0, unused)),
        F.pad(dense_bias, (0, unused)),
        F.pad(out_proj, (0, unused)),
    )
    return _float(dense, dense_bias, out_proj, out_bias)


def scaled_classifier(head: State, factor: Tensor, offset: Tensor) -> State:
    """Return the weights of a classification head of transformers with outputs `factor · y + offset` instead of `y`.

    Args:
        factor, offset: fp64 `[outputs]`.
    """
    weight, bias = head["out_proj.weight"].double(), head["out_proj.bias"].double()
    return _float(head["dense.weight"], head["dense.bias"], weight * factor[:, None], bias * factor + offset)


def _float(dense: Tensor, dense_bias: Tensor, out_proj: Tensor, out_bias: Tensor) -> State:
    names = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    return {name: tensor.float() for name, tensor in zip(names, (dense, dense_bias, out_proj, out_bias), strict=True)}
