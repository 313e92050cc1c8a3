"""L = λ·L_CLM + (1 − λ)·L_fusion, sparse and exact (FusionChat, equations 3 and 4).

At a position with the next token g, where the fused distribution gives probability p_i to id t_i:

    CLM    = logsumexp(z) − z_g
    fusion = Σ p_i (logsumexp(z) − z_{t_i})

Both share one logsumexp. Their gradients in the logits are softmax(z) − onehot(g) and softmax(z) − p. If the
rest of the distribution is kept as one outcome of probability r, it adds −r·log of the probability that the
student gives to all ids outside the t_i. The fusion term can be another divergence (``divergences``), and the
matched likelihood of chunks can take its place, or a part of it (``likelihoods``).

The student's logits exist for supervised positions only, a chunk at a time. The backward pass computes them again.
Sums are float32, whatever the model's dtype.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusion_trainer.representations.split_model import SplitModel, cached_parts, positions_at_a_time
from fusion_trainer.training.divergences import Divergence, pull
from fusion_trainer.training.likelihoods import Chunks, alm

__all__ = ["Targets", "Terms", "give_fusion_loss", "sparse_terms"]


class Terms(NamedTuple):
    """Both terms at each supervised position."""

    clm: Tensor  # float32 [S]
    fusion: Tensor  # float32 [S]
    squares: Tensor  # float32 [S, 2], squared norms of their gradients in the logits; 0 if not measured
    alm: Tensor | None = None  # float32 [S], the chunks' terms at their first positions


class Targets(SimpleNamespace):
    """The labels of a batch's supervised positions; built with keywords.

    It is no dataclass and no mapping, so that mixed precision leaves its tensors alone.
    """

    positions: Tensor  # int64 [S], indices into the flattened batch [B · L]
    gold: Tensor  # int64 [S], the next tokens
    ids: Tensor  # int64 [S, M], of the fused distribution; M may be 0
    probabilities: Tensor  # float32 [S, M]
    tail: Tensor | None  # float32 [S], the probability of all other ids; None if it is dropped
    clm_weight: Tensor  # float32 [S], λ
    divergence: Divergence | None = None  # of the fusion term; None for forward KL. Any other needs the tail
    chunks: Chunks | None = None  # for likelihood matching
    alm_weight: float = 0.0  # its share of the fusion term
    alm_temperature: float = 100.0
    scale: Tensor | float = 1.0  # the loss is multiplied by it: 1 / the tokens that it is averaged over
    norms: bool = False  # whether to measure the gradients of both terms
    terms: Terms | None = None  # set by the model's forward, detached
    loss: Tensor | None = None  # likewise; float32 even if mixed precision rounds what the model returns

    def weighted(self, terms: Terms) -> Tensor:
        """The loss at each position, not scaled, float32 [S]."""
        fusion_S = terms.fusion
        if terms.alm is not None:
            fusion_S = (1 - self.alm_weight) * fusion_S + self.alm_weight * terms.alm
        loss_S: Tensor = self.clm_weight * terms.clm + (1 - self.clm_weight) * fusion_S
        return loss_S


class _SparseTerms(torch.autograd.Function):
    """Logits → both terms; it saves the logits and a few numbers per position."""

    @staticmethod
    def forward(
        ctx: Any, norms: bool, divergence: Divergence | None, logits_CV: Tensor, *targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = cached_parts(logits_CV, *targets)
        results = zip(*(_terms(norms, divergence, *part) for part in parts), strict=True)
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in results]
        clm_C, fusion_C, squares_C2, *saved = columns
        ctx.save_for_backward(logits_CV, *saved)
        ctx.mark_non_differentiable(squares_C2)
        return clm_C, fusion_C, squares_C2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_CV, *saved = ctx.saved_tensors
        parts = [*cached_parts(logits_CV, *saved, *gradients[:2])]
        if len(parts) == 1:
            gradient_CV = _gradient(*parts[0]).to(logits_CV.dtype)
        else:
            gradient_CV = torch.empty_like(logits_CV)
            for rows_CV, part in zip(torch.split(gradient_CV, len(parts[0][0])), parts, strict=True):
                rows_CV.copy_(_gradient(*part))
        return None, None, gradient_CV, None, None, None, None


def _terms(
    norms: bool,
    divergence: Divergence | None,
    logits_CV: Tensor,
    gold_C: Tensor,
    ids_CM: Tensor,
    probabilities_CM: Tensor,
    tail_C: Tensor | None,
) -> tuple[Any, ...]:
    """Both terms, the squared norms of their gradients, and what ``_gradient`` takes after the logits."""
    z_CV = logits_CV.float()
    lse_C = z_CV.logsumexp(1)
    clm_C = lse_C - z_CV.gather(1, gold_C[:, None])[:, 0]
    saved: tuple[Tensor | None, ...]
    outside_C = None if tail_C is None else _outside(z_CV, ids_CM, probabilities_CM).logsumexp(1)
    if divergence is not None:
        assert tail_C is not None
        assert outside_C is not None
        log_q_CM = z_CV.gather(1, ids_CM) - lse_C[:, None]
        pulled = pull(divergence, log_q_CM, outside_C - lse_C, probabilities_CM, tail_C)
        fusion_C = pulled.value
        saved = (lse_C, None, gold_C, ids_CM, -pulled.ids, None, pulled.rest)
    else:
        fusion_C = (probabilities_CM * (lse_C[:, None] - z_CV.gather(1, ids_CM))).sum(1)
        mass_C = probabilities_CM.sum(1)
        if tail_C is not None and outside_C is not None:
            fusion_C, mass_C = fusion_C + tail_C * (lse_C - outside_C), mass_C + tail_C
        saved = (lse_C, outside_C, gold_C, ids_CM, probabilities_CM, tail_C, mass_C)
    squares_C2 = logits_CV.new_zeros(len(clm_C), 2, dtype=torch.float32)
    if norms:
        one_C, zero_C = torch.ones_like(lse_C), torch.zeros_like(lse_C)
        gradients = (_gradient(z_CV, *saved, *weights) for weights in ((one_C, zero_C), (zero_C, one_C)))
        squares_C2 = torch.stack([gradient.square_().sum(1) for gradient in gradients], 1)
    return clm_C, fusion_C, squares_C2, *saved


def _gradient(
    z_CV: Tensor,
    lse_C: Tensor,
    outside_C: Tensor | None,
    gold_C: Tensor,
    ids_CM: Tensor,
    probabilities_CM: Tensor,
    tail_C: Tensor | None,
    mass_C: Tensor,
    clm_weight_C: Tensor,
    fusion_weight_C: Tensor,
) -> Tensor:
    """The gradient of both weighted terms in the logits, float32 [C, V].

    The fusion term's is softmax · ``mass_C`` − ``probabilities_CM`` at the ids − the tail's share of the rest.
    """
    gradient_CV = (z_CV.float() - lse_C[:, None]).exp_()
    gradient_CV *= (clm_weight_C + fusion_weight_C * mass_C)[:, None]
    gradient_CV.scatter_add_(1, gold_C[:, None], -clm_weight_C[:, None])
    gradient_CV.scatter_add_(1, ids_CM, -(fusion_weight_C[:, None] * probabilities_CM))
    if tail_C is not None and outside_C is not None:
        rest_CV = (_outside(z_CV, ids_CM, probabilities_CM) - outside_C[:, None]).exp_()
        gradient_CV -= rest_CV.mul_((fusion_weight_C * tail_C)[:, None])
    return gradient_CV


def _outside(z_CV: Tensor, ids_CM: Tensor, probabilities_CM: Tensor) -> Tensor:
    """The logits, with −inf for the ids that have a probability of their own."""
    if not ids_CM.shape[1]:
        return z_CV
    likeliest_C1 = ids_CM.gather(1, probabilities_CM.argmax(1, keepdim=True))
    return z_CV.scatter(1, torch.where(probabilities_CM > 0, ids_CM, likeliest_C1), -torch.inf)


def sparse_terms(
    head: Callable[[Tensor], Tensor], hidden_SH: Tensor, targets: Targets, chunk: int | None = None
) -> Terms:
    """Both terms at S positions. The logits of all positions never exist at once.

    Args:
        head: Hidden states [C, H] → logits [C, V].
        hidden_SH: Hidden states of the supervised positions.
        targets: Their targets.
        chunk: Positions at a time; all by default.
    """
    measured: set[int] = set()

    def of_chunk(number: int, hidden_CH: Tensor, *chunk_targets: Any) -> Any:
        norms = targets.norms and number not in measured  # not again in the backward pass
        measured.add(number)
        logits_CV = head(hidden_CH)
        return _SparseTerms.apply(norms, targets.divergence, logits_CV, *chunk_targets)  # type: ignore[no-untyped-call]

    size = chunk or len(hidden_SH) or 1
    columns = (hidden_SH, targets.gold, targets.ids, targets.probabilities)
    chunks = list(zip(*(torch.split(column, size) for column in columns), strict=True))
    tails = [None] * len(chunks) if targets.tail is None else torch.split(targets.tail, size)
    run = partial(checkpoint, of_chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk
    numbered = enumerate(zip(chunks, tails, strict=True))
    parts = [run(number, *inputs, tail_C) for number, (inputs, tail_C) in numbered]
    terms = Terms(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if targets.chunks is None:
        return terms
    return terms._replace(alm=alm(terms.clm, targets.chunks, targets.alm_temperature))


def give_fusion_loss(model: Any, chunk: int | None = None) -> None:
    """Make a causal language model's ``forward`` accept ``targets`` and return their loss.

    The loss is computed inside the model's own forward, where DDP, FSDP, DeepSpeed and autocast expect it. Without
    ``targets`` the forward is unchanged. With them it returns a dict with ``loss``: the scaled sum of
    λ·CLM + (1 − λ)·fusion over the positions. A mixture of experts whose config asks for it adds its
    load-balancing loss, times the number of positions. The loss and both terms are also left in the ``Targets``.

    Args:
        model: A model of transformers, not wrapped for distribution or by adapters.
        chunk: Positions whose logits exist at a time.
    """
    split = SplitModel(model)

    def forward(*args: Any, targets: Targets | None = None, **inputs: Any) -> Any:
        if targets is None:
            return split.forward(*args, **inputs)
        inputs.pop("use_cache", None)
        router = bool(getattr(model.config, "output_router_logits", False))
        output = split.layers_output(**inputs, **({"output_router_logits": True} if router else {}))
        hidden_SH = output[0].flatten(0, 1).index_select(0, targets.positions)
        if len(hidden_SH):
            rows = int(getattr(model.config, "vocab_size", 0) or model.get_input_embeddings().num_embeddings)
            size = chunk or positions_at_a_time(hidden_SH.device, rows)
            terms = sparse_terms(split.head, hidden_SH, targets, size)
            loss = targets.weighted(terms).sum()
        else:  # nothing to learn, but every process takes part in the backward pass
            none = torch.zeros(0, device=hidden_SH.device)
            terms = Terms(none, none, none.reshape(0, 2))
            loss = 0.0 * split.head(output[0][0, :1]).float().sum()
        if router:
            loss = loss + len(hidden_SH) * _balance(split, output, inputs.get("attention_mask"))
        loss = loss * targets.scale
        alm_S = None if terms.alm is None else terms.alm.detach()
        targets.terms = Terms(terms.clm.detach(), terms.fusion.detach(), terms.squares, alm_S)
        targets.loss = loss.detach()
        return {"loss": loss}

    forward.__signature__ = inspect.signature(split.forward)  # type: ignore[attr-defined]  # generate() reads it
    model.forward = forward


def _balance(split: SplitModel, output: Any, mask_BL: Tensor | None) -> Tensor:
    """The weighted load-balancing loss that the model's own forward adds to its loss."""
    output.last_hidden_state = output.last_hidden_state[:, :1]
    router_output = split.given(output, attention_mask=mask_BL, output_router_logits=True)
    loss: Tensor = split.model.config.router_aux_loss_coef * router_output.aux_loss
    return loss
