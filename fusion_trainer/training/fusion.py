"""Fuse the pivot's and the sources' distributions into the one that each position learns from.

MinCE (``min_ce``; FuseLLM section 3.3, FusionChat section 3.2) takes the distribution of the model with the lowest
cross-entropy on the gold tokens. AvgCE (``avg_ce``) takes the mean weighted by softmax(1 / exp(CE)). The
cross-entropy is that of a whole conversation or of each token, per token or per byte. Only bytes are comparable
between tokenizers.

Distributions are sparse: ids and probabilities [positions, entries]. Entries with probability 0 do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusion_trainer.representations.store import Representation

__all__ = ["Compare", "Function", "Fused", "Rule", "Tail", "Unit", "cross_entropies", "fuse"]

Function = Literal["min_ce", "avg_ce"]
Compare = Literal["conversation", "token"]
Unit = Literal["token", "byte"]
Tail = Literal["renormalise", "bucket"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """How distributions are fused. The papers take all defaults but one: they compare per token."""

    function: Function = "min_ce"
    compare: Compare = "conversation"  # compare models by conversation, or at each token
    unit: Unit = "byte"  # cross-entropy per byte, or per token
    temperature: float = 1.0  # probabilities are raised to the power 1 / temperature and renormalised
    tail: Tail = "renormalise"  # drop the probability outside the top k, or keep it as one more outcome


@dataclass(frozen=True)
class Fused:
    """The fused distributions of P positions. Entries and tail sum to 1, or to 0 where no model has any."""

    ids: NDArray[np.int64]  # [P, entries]; at a position, an id has probability in one entry only
    probabilities: NDArray[np.float32]  # [P, entries]
    tail: NDArray[np.float32]  # [P], the probability of all other ids; 0 if it is dropped
    shares: NDArray[np.float32]  # [P, models], the share of each model
    confidence: NDArray[np.float32]  # [P], exp(−CE) of the chosen model; with AvgCE the mean over the models used


def cross_entropies(
    rows: Sequence[Representation], rule: Rule, size: int, gold_bytes: NDArray[np.integer]
) -> Floats:
    """Each model's cross-entropy on the gold tokens, float64 [models, P], in nats per unit.

    It is inf where a model has no prediction.

    Args:
        rows: The pivot's own row (if it takes part) and the aligned rows of the sources, P positions each.
        rule: Its ``compare`` and ``unit``.
        size: Bytes of the text that the pivot's row predicts.
        gold_bytes: [P], bytes of the pivot's gold tokens.
    """
    found_MP = np.array([-row.gold_logprob.astype(np.float64) for row in rows])
    if rule.compare == "conversation":
        length = size if rule.unit == "byte" else found_MP.shape[1]
        means_M = np.array([golds_P.sum() for golds_P in found_MP]) / max(1, length)
        found_MP[:] = _by_conversation(rows, rule.unit, means_M)[:, None]
    elif rule.unit == "byte":
        found_MP /= [np.maximum(gold_bytes if row.gold_bytes is None else row.gold_bytes, 1) for row in rows]
    found_MP[np.isnan(found_MP)] = np.inf
    return found_MP


def _by_conversation(rows: Sequence[Representation], unit: Unit, own_M: Floats) -> Floats:
    """Each source against the pivot over the bytes that both predict, float64 [models].

    These bytes may differ between sources. Each source keeps its distance to the pivot over the bytes in common,
    and the pivot stands at the mean of its own cross-entropies over them.
    """
    names = (f"ce_per_{unit}", f"pivot_ce_per_{unit}")
    pairs = [[np.nan if (ce := getattr(row, name)) is None else ce for name in names] for row in rows]
    source_M, pivot_M = np.array(pairs, np.float64).T
    aligned_M = np.array([row.ce_per_token is not None for row in rows])
    common = pivot_M[np.isfinite(pivot_M)]
    if not aligned_M.any():
        return own_M
    if not len(common):  # no source has a byte in common with the pivot
        return np.where(aligned_M, np.inf, own_M)
    base = common.mean()
    means_M: Floats = np.where(aligned_M, source_M - pivot_M + base, base)
    return means_M


def fuse(rows: Sequence[Representation], entropies_MP: Floats, rule: Rule) -> Fused:
    """The fused distributions of P positions.

    Args:
        rows: M models' distributions over the pivot's ids, P positions and k entries each. With equal
            cross-entropies the first model wins.
        entropies_MP: float64 [M, P], from ``cross_entropies``.
        rule: How to fuse.
    """
    tempered = [_tempered(row, rule) for row in rows]
    silent_MP = np.array([~shares_PK.any(1) for shares_PK, _ in tempered])  # all is tail: no id has probability
    entropies_MP = np.where(silent_MP, np.inf, entropies_MP)
    likelihoods_MP = np.exp(-entropies_MP)
    if rule.function == "min_ce":
        weights_MP = (np.arange(len(rows))[:, None] == entropies_MP.argmin(0)).astype(np.float64)
        confidence_P = likelihoods_MP.max(0)
    else:
        weights_MP = np.where(np.isfinite(entropies_MP), np.exp(likelihoods_MP), 0.0)
        weights_MP[0, weights_MP.sum(0) == 0] = 1.0  # no model has a prediction: the first, which is the pivot
        weights_MP /= weights_MP.sum(0)
        confidence_P = likelihoods_MP.sum(0) / np.maximum(1, np.isfinite(entropies_MP).sum(0))
    weights_MP = np.where(silent_MP, 0.0, weights_MP)
    used = [model for model, weights_P in enumerate(weights_MP) if weights_P.any()] or [0]
    ids = [rows[model].ids.astype(np.int64) for model in used]
    shares = [tempered[model][0] * weights_MP[model][:, None] for model in used]
    if len(used) == 1:
        ids_PK, shares_PK = ids[0], shares[0]
    elif rule.function == "min_ce":  # only one model has weight at a position
        chosen = np.array([share_PK.any(1) for share_PK in shares]).argmax(0), np.arange(len(ids[0]))
        ids_PK, shares_PK = np.array(ids)[chosen], np.array(shares)[chosen]
    else:
        ids_PK, shares_PK = _added(np.concatenate(ids, 1), np.concatenate(shares, 1))
    tail_P = np.sum([tempered[model][1] * weights_MP[model] for model in used], axis=0)
    others = (array.astype(np.float32) for array in (shares_PK, tail_P, weights_MP.T, confidence_P))
    return Fused(ids_PK, *others)


def _tempered(row: Representation, rule: Rule) -> tuple[Floats, Floats]:
    """Probabilities [P, k] and tail [P] that sum to 1; all 0 where the row has no probability."""
    logarithms = row.logprobs.astype(np.float64) / rule.temperature
    if rule.tail == "renormalise":
        highest = logarithms.max(1, keepdims=True, initial=-np.inf)
        shares = np.exp(logarithms - np.where(np.isfinite(highest), highest, 0.0))
        tail = np.zeros(len(row))
    else:
        shares = np.exp(logarithms)
        tail = row.tail.astype(np.float64) ** (1 / rule.temperature)
    total = shares.sum(1) + tail
    total[total == 0] = 1.0
    return shares / total[:, None], tail / total


def _added(ids: NDArray[np.int64], shares: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Add the entries of equal ids: the last of them holds the sum, the others 0."""
    order = ids.argsort(1, kind="stable")
    ids, shares = np.take_along_axis(ids, order, 1), np.take_along_axis(shares, order, 1)
    last = np.ones(ids.shape, bool)
    last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    for column in range(1, ids.shape[1]):
        shares[:, column] += np.where(last[:, column - 1], 0.0, shares[:, column - 1])
    return ids, np.where(last, shares, 0.0)
