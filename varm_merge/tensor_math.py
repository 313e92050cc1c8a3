"""Chunked reductions and weighted sums over one pivot tensor and its K targets; torch only.

On a CPU a reduction with fresh temporaries spends its time in the allocator, not in the arithmetic (15 ns an
element against 0.6). So every pass here walks the flat tensors in chunks that stay in cache and works in one
reused float64 buffer. Float64 is what makes the rules of the method free: squares of the smallest float32
delta do not underflow, 10⁹ of them add up exactly enough, and a result is rounded once, to the output's dtype.

Shapes: K targets, C elements of a chunk. Arguments are tensors of one shape and device, any floating dtype.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varm_merge.weights import Normalization, Statistic

__all__ = ["ElementWeights", "Selection", "blend", "blend_elements", "delta_sums", "select"]

CPU_CHUNK = 1 << 18
ACCELERATOR_CHUNK = 1 << 22
RADIX_BITS = 16

_workspace = threading.local()


def delta_sums(
    pivot: Tensor, targets: Sequence[Tensor], statistic: Statistic, selection: "Selection | None"
) -> list[float]:
    """Σ Δ_j² (or Σ |Δ_j|) over the selected elements, for each of the K targets; float64.

    NaN or Inf anywhere in the inputs makes at least one sum non-finite.
    """
    sums_K = torch.zeros(len(targets), dtype=torch.float64, device=pivot.device)
    for chunk in _chunks(pivot, targets):
        pivot_C, deltas_KC = chunk.pivot_C, chunk.values_KC
        torch.sub(deltas_KC, pivot_C, out=deltas_KC)
        if selection is not None:
            deltas_KC *= selection.mask(deltas_KC, chunk.start)
        for target, delta_C in enumerate(deltas_KC):
            sums_K[target] += torch.dot(delta_C, delta_C) if statistic == "square" else delta_C.abs_().sum()
    return [float(value) for value in sums_K.tolist()]


def blend(targets: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Write Σ_j W_j θ_j into ``out``; the K weights are ≥ 0 and sum to 1.

    Taken as a chain of linear interpolations with the running share W_j / Σ_{i≤j} W_i: equal targets give
    that target to the bit, one weight of 1 copies, and no element leaves the hull of the targets.
    """
    moving = [(target, weight) for target, weight in zip(targets, weights, strict=True) if weight > 0]
    if len(moving) == 1:
        out.copy_(moving[0][0])
        return
    flat_out = out.view(-1)
    for chunk in _chunks(moving[0][0], [target for target, _ in moving[1:]]):
        merged_C, total = chunk.pivot_C, moving[0][1]
        for values_C, (_, weight) in zip(chunk.values_KC, moving[1:], strict=True):
            total += weight
            merged_C.lerp_(values_C, weight / total)
        flat_out[chunk.start : chunk.stop].copy_(merged_C)


def blend_elements(
    pivot: Tensor,
    targets: Sequence[Tensor],
    weigh: Callable[[Tensor], Tensor],
    out: Tensor,
    *,
    selection: "Selection | None",
    erase_minority: bool,
) -> None:
    """Write the element-wise weighted merge into ``out``; an element that keeps no target keeps the pivot.

    ``weigh`` gets the (selected) deltas of a chunk, [K, C], and returns weights [K, C] or [K, 1]. With
    ``erase_minority`` a delta whose sign is not that of the summed delta loses its weight (a zero delta has
    no sign and loses it too; a zero sum counts as positive) and the rest is renormalised: SCE's erase step.
    """
    flat_out = out.view(-1)
    for chunk in _chunks(pivot, targets):
        merged_C, values_KC = chunk.pivot_C, chunk.values_KC
        deltas_KC = torch.sub(values_KC, merged_C, out=chunk.scratch_KC)
        mask_C = selection.mask(deltas_KC, chunk.start) if selection is not None else None
        if mask_C is not None:
            deltas_KC *= mask_C
        kept_KC = deltas_KC.sign() == _majority_sign(deltas_KC) if erase_minority else None
        weights_KC = weigh(deltas_KC)
        for keep in (mask_C, kept_KC):
            weights_KC = weights_KC if keep is None else weights_KC * keep
        total_C = torch.zeros_like(merged_C)
        for values_C, weights_C in zip(values_KC, weights_KC, strict=True):
            total_C += weights_C
            merged_C.lerp_(values_C, (weights_C / total_C).nan_to_num_(nan=0.0))
        flat_out[chunk.start : chunk.stop].copy_(merged_C)


class ElementWeights:
    """Granularity ``parameter``: maps deltas [K, C] to weights [K, C], by the rule of ``weights.normalize``.

    An element that no target moved gets uniform weights. The deltas are overwritten. ``statistic_sums_K`` and
    ``weight_sums_K`` (float64, [K]) add up over the chunks it was called on.
    """

    def __init__(
        self,
        statistic: Statistic,
        normalization: Normalization,
        temperature: float,
        pivot: Tensor,
        targets: int,
    ) -> None:
        self.statistic, self.normalization, self.temperature = statistic, normalization, temperature
        self.statistic_sums_K = torch.zeros(targets, dtype=torch.float64, device=pivot.device)
        self.weight_sums_K = torch.zeros_like(self.statistic_sums_K)

    def __call__(self, deltas_KC: Tensor) -> Tensor:
        weights_KC = deltas_KC.square_() if self.statistic == "square" else deltas_KC.abs_()
        targets = len(weights_KC)
        self.statistic_sums_K += weights_KC.sum(dim=1)
        total_C = weights_KC.sum(dim=0)
        if self.normalization == "sum":
            weights_KC.div_(total_C).nan_to_num_(nan=1 / targets)
        else:
            mean_C = total_C.mul_(self.temperature / targets)
            weights_KC = weights_KC.div_(mean_C).nan_to_num_(nan=0.0).softmax(dim=0)
        self.weight_sums_K += weights_KC.sum(dim=1)
        return weights_KC


@dataclass(frozen=True)
class Selection:
    """Which elements of one tensor vary most across its targets (SCE's select step).

    Chosen are the elements whose variance, as the bits of a float64, is above ``threshold``, and those equal to
    it at a flat index below ``tie_stop``.
    """

    threshold: int
    tie_stop: int

    def mask(self, deltas_KC: Tensor, start: int) -> Tensor:
        """Bool [C] for the chunk that begins at flat index ``start``."""
        bits_C = _variance_bits(deltas_KC)
        chosen_C = bits_C > self.threshold
        ties = min(max(self.tie_stop - start, 0), len(bits_C))
        if ties:
            chosen_C[:ties] |= bits_C[:ties] == self.threshold
        return chosen_C


def select(pivot: Tensor, targets: Sequence[Tensor], fraction: float) -> Selection:
    """The selection of the ``fraction`` of a tensor's elements with the highest variance across targets.

    Counted, as mergekit's ``sce`` does, among the elements with a variance above zero and rounded down; ties
    go to the lower index. An exact radix selection over the bits of the variances (non-negative float64s
    order as their bits do), so it needs passes over the tensor, never a copy of it.
    """

    def variance_bits() -> Iterator[tuple[int, Tensor]]:
        for chunk in _chunks(pivot, targets):
            yield chunk.start, _variance_bits(chunk.values_KC.sub_(chunk.pivot_C))

    wanted = int(sum(int(torch.count_nonzero(bits_C)) for _, bits_C in variance_bits()) * fraction)
    nothing = Selection(threshold=torch.iinfo(torch.int64).max, tie_stop=0)
    if wanted == 0:
        return nothing
    prefix = 0
    for shift in range(64 - RADIX_BITS, -1, -RADIX_BITS):
        counts = torch.zeros(1 << RADIX_BITS, dtype=torch.int64, device=pivot.device)
        for _, bits_C in variance_bits():
            candidates = bits_C >> shift
            if shift < 64 - RADIX_BITS:
                candidates = candidates[candidates >> RADIX_BITS == prefix]
            counts += torch.bincount(candidates & ((1 << RADIX_BITS) - 1), minlength=1 << RADIX_BITS)
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1
        prefix = (prefix << RADIX_BITS) | digit
        in_bucket = int(counts[digit])
        wanted -= int(at_least[digit]) - in_bucket
        if wanted == in_bucket:
            return Selection(threshold=(prefix << shift) - 1, tie_stop=0)
    for start, bits_C in variance_bits():
        ties = torch.nonzero(bits_C == prefix).view(-1)
        if len(ties) >= wanted:
            return Selection(threshold=prefix, tie_stop=start + int(ties[wanted - 1]) + 1)
        wanted -= len(ties)
    return nothing


@dataclass(frozen=True)
class _Chunk:
    start: int
    stop: int
    pivot_C: Tensor
    values_KC: Tensor
    scratch_KC: Tensor


def _chunks(pivot: Tensor, targets: Sequence[Tensor]) -> Iterator[_Chunk]:
    """Walk the flat tensors; the yielded tensors are float64 views of one buffer, overwritten by the next step."""
    flat_pivot, flat_targets = pivot.reshape(-1), [target.reshape(-1) for target in targets]
    count = len(targets)
    size = max((CPU_CHUNK if pivot.device.type == "cpu" else ACCELERATOR_CHUNK) // (count + 1), 1)
    size = min(size, max(flat_pivot.numel(), 1))
    buffer = _buffer((2 * count + 1) * size, pivot)
    for start in range(0, flat_pivot.numel(), size):
        stop = min(start + size, flat_pivot.numel())
        rows = buffer[: (2 * count + 1) * (stop - start)].view(2 * count + 1, stop - start)
        rows[0].copy_(flat_pivot[start:stop])
        for row, target in zip(rows[1 : count + 1], flat_targets, strict=True):
            row.copy_(target[start:stop])
        yield _Chunk(start, stop, rows[0], rows[1 : count + 1], rows[count + 1 :])


def _buffer(elements: int, like: Tensor) -> Tensor:
    """This thread's reused buffer on the device of ``like``, grown where it is too small."""
    buffers: dict[torch.device, Tensor] = _workspace.__dict__.setdefault("buffers", {})
    buffer = buffers.get(like.device)
    if buffer is None or buffer.numel() < elements:
        buffer = buffers[like.device] = torch.empty(elements, dtype=torch.float64, device=like.device)
    return buffer


def _majority_sign(deltas_KC: Tensor) -> Tensor:
    return torch.where(deltas_KC.sum(dim=0) >= 0, 1.0, -1.0).to(deltas_KC.dtype)


def _variance_bits(deltas_KC: Tensor) -> Tensor:
    return deltas_KC.var(dim=0, unbiased=False).view(torch.int64)
