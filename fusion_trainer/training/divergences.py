"""Divergences between the fused distribution p and the student's q.

| name | |
|---|---|
| ``forward_kl`` | Σ p log(p / q), without its constant Σ p log p: the papers' cross-entropy (in ``loss``) |
| ``reverse_kl`` | Σ q log(q / p) |
| ``js`` | β·KL(p ‖ m) + (1 − β)·KL(q ‖ m) with m = β·p + (1 − β)·q (arXiv 2306.13649, section 2) |

The sums run over K + 1 outcomes: the K ids that have a probability, and all other ids as one. A ``Divergence``
gives its value and its slopes d_o = ∂D/∂q_o, up to a constant. With q the sums of a softmax, the gradient in the
logit of an id of outcome o is the student's probability of this id times (d_o − Σ q d). So it needs one number for
the rest of the vocabulary, and K for the ids.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Divergence", "Name", "Pull", "divergence_named", "js", "pull", "reverse_kl"]

Name = Literal["forward_kl", "reverse_kl", "js"]
Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""p, q and log q of the outcomes, float32 [C, O], the rest last → the value [C] and its slopes [C, O]."""
LEAST_TAIL = 2.0**-25
"""The largest probability that a store's float16 rounds to 0; the least that reverse KL takes for the rest."""
TINY = float(torch.finfo(torch.float32).tiny)
LOG_ZERO = -104.0
"""The exponential of this and of less is 0 in float32."""


class Pull(NamedTuple):
    """A divergence, and its gradient in the logits: softmax · ``rest``, plus ``ids`` at the K ids."""

    value: Tensor  # float32 [C]
    rest: Tensor  # float32 [C]
    ids: Tensor  # float32 [C, K]


def divergence_named(name: Name, beta: float = 0.5) -> Divergence | None:
    """The divergence of this name; None for ``forward_kl``, which is computed without it."""
    return {"forward_kl": None, "reverse_kl": reverse_kl, "js": partial(js, beta=beta)}[name]


def reverse_kl(p_CO: Tensor, q_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p). The rest has at least the probability ``LEAST_TAIL`` in p."""
    least_O = torch.full_like(p_CO[:1], TINY)
    least_O[:, -1] = LEAST_TAIL
    slopes_CO = log_q_CO - torch.maximum(p_CO, least_O).log()
    return (q_CO * slopes_CO).sum(1), slopes_CO


def js(p_CO: Tensor, q_CO: Tensor, log_q_CO: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m)."""
    log_m_CO = (beta * p_CO + (1 - beta) * q_CO).clamp_min(TINY).log()
    slopes_CO = (1 - beta) * (log_q_CO - log_m_CO)
    from_p_C = (torch.xlogy(p_CO, p_CO) - p_CO * log_m_CO).sum(1)
    return beta * from_p_C + (q_CO * slopes_CO).sum(1), slopes_CO


def pull(
    divergence: Divergence, log_q_CM: Tensor, log_rest_C: Tensor, probabilities_CM: Tensor, tail_C: Tensor
) -> Pull:
    """The divergence at C positions; 0 where no id has a probability.

    Args:
        divergence: Which one.
        log_q_CM: The student's log-probabilities of M ids.
        log_rest_C: Its log-probability of all other ids together.
        probabilities_CM: The fused distribution; entries of probability 0 do not count.
        tail_C: Its probability of all other ids.
    """
    counts_CO = torch.cat([probabilities_CM > 0, torch.ones_like(tail_C[:, None], dtype=torch.bool)], 1)
    log_q_CO = torch.cat([log_q_CM, log_rest_C[:, None]], 1).clamp_min(LOG_ZERO)
    log_q_CO = torch.where(counts_CO, log_q_CO, 0.0)
    q_CO = torch.where(counts_CO, log_q_CO.exp(), 0.0)
    value_C, slopes_CO = divergence(torch.cat([probabilities_CM, tail_C[:, None]], 1), q_CO, log_q_CO)
    fused_C = probabilities_CM.any(1)
    rest_C = slopes_CO[:, -1] - (q_CO * slopes_CO).sum(1)
    ids_CM = q_CO[:, :-1] * (slopes_CO[:, :-1] - slopes_CO[:, -1:])
    return Pull(torch.where(fused_C, value_C, 0.0), torch.where(fused_C, rest_C, 0.0), ids_CM * fused_C[:, None])
