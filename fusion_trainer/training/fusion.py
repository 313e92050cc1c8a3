"""The distribution a position learns from, fused of the pivot's own and those of one or more sources.

``min_ce`` (MinCE, FuseLLM section 3.3; FusionChat section 3.2) takes that of the model with the lowest
cross-entropy on the gold tokens, ``avg_ce`` (AvgCE) the mean weighted by softmax(1 / exp(CE)). Cross-entropies are
those of a whole conversation or of each token, per token or per byte; bytes are comparable between tokenizers.

Distributions stay sparse: [positions, entries] ids and probabilities. Entries of probability 0 do not count.
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
    """How distributions are fused.

    Attributes:
        function: MinCE or AvgCE.
        compare: Models are compared by conversation (the papers) or at each token.
        unit: Their cross-entropy is per byte, or per token (the papers), which tokenizers' sizes decide.
        temperature: Of the models' distributions: probabilities to the power of its inverse, renormalised.
        tail: The probability outside the top k is dropped and the rest renormalised (the papers), or kept as one
            outcome more.
    """

    function: Function = "min_ce"
    compare: Compare = "conversation"
    unit: Unit = "byte"
    temperature: float = 1.0
    tail: Tail = "renormalise"


@dataclass(frozen=True)
class Fused:
    """What P positions learn from.

    Attributes:
        ids: int64 [P, entries]; no id has probability in two entries of a position.
        probabilities: float32 [P, entries].
        tail: float32 [P], the probability of all other ids together; 0 where it is dropped. Sums to 1 with the
            entries, or all are 0 where no model says anything.
        shares: float32 [P, models], how much of it is each model's.
        confidence: float32 [P], exp(−CE) of the model taken, for AvgCE the mean of all that are heard.
    """

    ids: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    tail: NDArray[np.float32]
    shares: NDArray[np.float32]
    confidence: NDArray[np.float32]


def cross_entropies(
    rows: Sequence[Representation], rule: Rule, size: int, gold_bytes: NDArray[np.integer]
) -> Floats:
    """Of each model on the gold tokens, float64 [models, P] in nats per unit; inf where a model has read nothing.

    Args:
        rows: The pivot's own row (if it takes part) and aligned rows of the sources, P positions each.
        rule: Whether by conversation or by token, and in which unit.
        size: Bytes of text the pivot's row predicts.
        gold_bytes: [P], bytes of each of the pivot's gold tokens.
    """
    found = np.empty((len(rows), len(rows[0])))
    for entropies, row in zip(found, rows, strict=True):
        golds = -row.gold_logprob.astype(np.float64)
        if rule.compare == "token":
            entropies[:] = golds
            if rule.unit == "byte":
                entropies /= np.maximum(gold_bytes if row.gold_bytes is None else row.gold_bytes, 1)
        else:
            entropies[:] = golds.sum() / max(1, size if rule.unit == "byte" else len(golds))
    if rule.compare == "conversation":
        found[:] = _by_conversation(rows, rule.unit, found)
    found[np.isnan(found)] = np.inf
    return found


def _by_conversation(rows: Sequence[Representation], unit: Unit, own_MP: Floats) -> Floats:
    """Each source against the pivot over the bytes that both predict, float64 [models, P].

    With several sources these bytes may differ. Each source then lies as far from the pivot as it does over the
    bytes that it has in common with it.
    """
    names = ("ce_per_byte", "pivot_ce_per_byte") if unit == "byte" else ("ce_per_token", "pivot_ce_per_token")
    pairs = [[np.nan if (ce := getattr(row, name)) is None else ce for name in names] for row in rows]
    source_M, pivot_M = np.array(pairs, np.float64).T
    aligned = np.array([row.ce_per_token is not None for row in rows])
    common = pivot_M[np.isfinite(pivot_M)]
    if not aligned.any():
        return own_MP
    if not len(common):  # no source has anything in common with the pivot
        return np.where(aligned[:, None], np.inf, own_MP)
    base = common.mean()
    values_M = np.where(aligned, source_M - pivot_M + base, base)
    found: Floats = values_M[:, None] + np.zeros_like(own_MP)
    return found


def fuse(rows: Sequence[Representation], entropies_MP: Floats, rule: Rule) -> Fused:
    """The distributions that P positions learn from.

    Args:
        rows: M models' distributions over the pivot's ids, P positions and k entries each. Of equals the first
            wins.
        entropies_MP: float64 [M, P].
        rule: How.
    """
    tempered = [_tempered(row, rule) for row in rows]
    silent_MP = np.array([~shares.any(1) for shares, _ in tempered])  # all is tail: it names no id
    entropies_MP = np.where(silent_MP, np.inf, entropies_MP)
    likelihoods_MP = np.exp(-entropies_MP)
    weights_MP = _taken(entropies_MP) if rule.function == "min_ce" else _softmax(likelihoods_MP, entropies_MP)
    weights_MP = np.where(silent_MP, 0.0, weights_MP)
    if rule.function == "min_ce":
        confidence = likelihoods_MP.max(0)
    else:
        confidence = likelihoods_MP.sum(0) / np.maximum(1, np.isfinite(entropies_MP).sum(0))
    columns = [model for model, weights in enumerate(weights_MP) if weights.any()] or [0]
    ids, probabilities, tail = _mixed(
        [rows[model].ids.astype(np.int64) for model in columns],
        [tempered[model][0] * weights_MP[model][:, None] for model in columns],
        [tempered[model][1] * weights_MP[model] for model in columns],
        one_each=rule.function == "min_ce",
    )
    return Fused(
        ids,
        probabilities.astype(np.float32),
        tail.astype(np.float32),
        weights_MP.T.astype(np.float32),
        confidence.astype(np.float32),
    )


def _tempered(row: Representation, rule: Rule) -> tuple[Floats, Floats]:
    """Probabilities [P, k] and tail [P] that sum to 1; all 0 where the row has no probability to give."""
    logarithms = row.logprobs.astype(np.float64) / rule.temperature
    shares = np.exp(logarithms)
    if rule.tail == "renormalise":
        tail = np.zeros(len(row))
        highest = logarithms.max(1, keepdims=True, initial=-np.inf)
        shares = np.exp(logarithms - np.where(np.isfinite(highest), highest, 0.0))
    else:
        tail = row.tail.astype(np.float64) ** (1 / rule.temperature)
    total = shares.sum(1) + tail
    total[total == 0] = 1.0
    return shares / total[:, None], tail / total


def _taken(entropies_MP: Floats) -> Floats:
    """1 for the model with the lowest cross-entropy, the first of equals, at each position."""
    taken: Floats = (np.arange(len(entropies_MP))[:, None] == entropies_MP.argmin(0)).astype(np.float64)
    return taken


def _softmax(likelihoods_MP: Floats, entropies_MP: Floats) -> Floats:
    weights = np.where(np.isfinite(entropies_MP), np.exp(likelihoods_MP), 0.0)
    total = weights.sum(0)
    weights[0, total == 0] = 1.0  # nobody has read anything: the first, which is the pivot's own
    shares: Floats = weights / weights.sum(0)
    return shares


def _mixed(
    ids: Sequence[NDArray[np.int64]], shares: Sequence[Floats], tails: Sequence[Floats], one_each: bool
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Weighted distributions as one; with ``one_each`` only one of them has weight at a position."""
    tail = np.sum(tails, axis=0)
    if len(ids) == 1:
        return ids[0], shares[0], tail
    if one_each:
        heard = np.array([share.any(1) for share in shares]).argmax(0)
        everywhere = np.arange(len(heard))
        return np.array(ids)[heard, everywhere], np.array(shares)[heard, everywhere], tail
    return *_added(np.concatenate(ids, 1), np.concatenate(shares, 1)), tail


def _added(ids: NDArray[np.int64], shares: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Entries of one id made one: the sum stands in the last of them, 0 in the others."""
    order = ids.argsort(1, kind="stable")
    ids, shares = np.take_along_axis(ids, order, 1), np.take_along_axis(shares, order, 1)
    last = np.ones(ids.shape, bool)
    last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    for column in range(1, ids.shape[1]):
        shares[:, column] += np.where(last[:, column - 1], 0.0, shares[:, column - 1])
    return ids, np.where(last, shares, 0.0)
