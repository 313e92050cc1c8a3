"""VaRM and SCE in a few lines of dense float64 numpy, written from the formulas and not from the code.

W_{j,m} = E_m[Δ_j²] / Σ_i E_m[Δ_i²]        merged_m = Σ_j W_{j,m} θ_{j,m}       (FusionChat, section 3.3)

With priors p_j and a scale λ: W_{j,m} ∝ p_j E_m[Δ_j²]        merged_m = θ_v + λ Σ_j W_{j,m} Δ_{j,m}
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

import numpy as np

Arrays = Mapping[str, np.ndarray]


def merge(
    pivot: Arrays,
    targets: Sequence[Arrays],
    unit_of: Callable[[str], str] | None,
    *,
    statistic: str = "square",
    normalization: str = "sum",
    temperature: float = 1.0,
    select_topk: float = 1.0,
    erase_minority: bool = False,
    priors: Sequence[float] | None = None,
    scale: float = 1.0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(merged tensors by name, weights [K] by unit); ``unit_of`` None is granularity ``parameter``."""
    deltas = {
        name: np.stack([target[name].astype(np.float64) - pivot[name].astype(np.float64) for target in targets])
        for name in pivot
    }
    masks = {name: select(delta_K, select_topk) for name, delta_K in deltas.items()}
    measured = {
        name: (np.square if statistic == "square" else np.abs)(deltas[name] * masks[name]) for name in deltas
    }

    if unit_of is None:
        weights = {
            name: normalize(values_K, normalization, temperature, priors) for name, values_K in measured.items()
        }
        by_unit = {}
    else:
        pooled = defaultdict(list)
        for name, values_K in measured.items():
            pooled[unit_of(name)].append(values_K.reshape(len(targets), -1))
        by_unit = {
            unit: normalize(np.concatenate(parts, axis=1).mean(axis=1), normalization, temperature, priors)
            for unit, parts in pooled.items()
        }
        weights = {
            name: by_unit[unit_of(name)].reshape(-1, *[1] * (deltas[name].ndim - 1)) * np.ones_like(deltas[name])
            for name in deltas
        }

    merged = {}
    for name, delta_K in deltas.items():
        masked_K, kept_K = delta_K * masks[name], weights[name] * masks[name]
        if erase_minority:
            majority = np.where(masked_K.sum(axis=0) >= 0, 1, -1)
            kept_K = kept_K * (np.sign(masked_K) == majority)
            total = kept_K.sum(axis=0)
            kept_K = np.divide(kept_K, total, out=np.zeros_like(kept_K), where=total > 0)
        merged[name] = pivot[name].astype(np.float64) + scale * (kept_K * masked_K).sum(axis=0)
    return merged, by_unit


def normalize(
    statistics_K: np.ndarray, normalization: str, temperature: float, priors: Sequence[float] | None = None
) -> np.ndarray:
    """Weights along the first axis; those of the priors where every statistic is zero."""
    total = statistics_K.sum(axis=0)
    safe = np.where(total > 0, total, 1)
    if normalization == "sum":
        weights_K = statistics_K / safe
    else:
        exponents_K = statistics_K / (safe / len(statistics_K) * temperature)
        exponentials_K = np.exp(exponents_K - exponents_K.max(axis=0))
        weights_K = exponentials_K / exponentials_K.sum(axis=0)
    priors_K = np.ones(len(statistics_K)) if priors is None else np.array(priors, np.float64)
    priors_K = priors_K.reshape(-1, *[1] * (statistics_K.ndim - 1))
    weighed_K = priors_K * np.where(total > 0, weights_K, 1)
    weighed_K = np.where(weighed_K.sum(axis=0) > 0, weighed_K, priors_K)  # only targets of prior 0 moved
    return weighed_K / np.where(weighed_K.sum(axis=0) > 0, weighed_K.sum(axis=0), 1)


def select(delta_K: np.ndarray, fraction: float) -> np.ndarray:
    """SCE's select: 1 for the ⌊fraction · (elements that vary)⌋ of highest variance, ties to the lower index."""
    if fraction >= 1 or len(delta_K) < 2:
        return np.ones(delta_K.shape[1:])
    spread = (delta_K[:, None] - delta_K[None]) ** 2  # summed over pairs of targets: 2·K² times the variance
    variance = spread.sum(axis=(0, 1)).ravel()
    count = int(np.count_nonzero(variance) * Decimal(str(fraction)))
    mask = np.zeros_like(variance)
    mask[np.argsort(-variance, kind="stable")[:count]] = 1
    return mask.reshape(delta_K.shape[1:])
