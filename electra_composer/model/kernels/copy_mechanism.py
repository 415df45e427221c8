"""Copy mechanism for the prediction of every token of the input, as an addition to the masked-LM kernels.

ELECTRA's all-tokens MLM (Clark et al., ICLR 2020, arXiv 2003.10555, section 3.4) gives each position a copy probability
D = sigmoid(c). The output distribution is D on the input token x plus 1 - D times the softmax p. For the target t:

    loss = -log(D [x = t] + (1 - D) p(t))

The softmax enters only by nll = -log p(t), so the kernels of the plain cross entropy give all its gradients: d loss /
d nll, the probability that the softmax and not the copy produced the target, multiplies the row's weight,

    d loss / d nll = (1 - D) p(t) / (D [x = t] + (1 - D) p(t)) = sigmoid(-nll - c) if x = t, otherwise 1

The gradient of c is autograd's, from an nll without gradient. Logarithms are used throughout because D and p underflow.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_odds_of_copies(copy_logits: Tensor, copied: Tensor) -> Tensor:
    """Return log(D [x = t] / (1 - D)), fp32 without gradient: the copy logit, or minus infinity where x ≠ t.

    `copy_logits`: floats `[M]`; `copied`: booleans `[M]`, x = t.
    """
    return copy_logits.detach().float().masked_fill(~copied, -math.inf)


def softmax_shares(token_losses: Tensor, log_odds: Tensor) -> Tensor:
    """Return d loss / d nll, fp32 `[M]` in [0, 1]; `token_losses`: nll, fp32 `[M]`; `log_odds`: see above."""
    return torch.sigmoid(-log_odds - token_losses)


def mixture_losses(token_losses: Tensor, copy_logits: Tensor, copied: Tensor) -> Tensor:
    """Return the losses fp32 `[M]`, differentiable with respect to `copy_logits`; arguments as above."""
    copy_logits = copy_logits.float()
    log_copy = F.logsigmoid(copy_logits).masked_fill(~copied, -math.inf)
    return -torch.logaddexp(log_copy, F.logsigmoid(-copy_logits) - token_losses)
