"""Chunked reductions and weighted sums over one pivot tensor and its K targets; torch only.

On a CPU a reduction with fresh temporaries spends its time in the allocator, not in the arithmetic. So every pass
walks the flat tensors in chunks that stay in cache, and computes in reused buffers of float64. In float64 the
squares of the smallest float32 delta do not underflow, sums over 10⁹ elements lose nothing that matters, and a
result is rounded only when it is written.

Each thread takes whole chunks, and torch does not split operations in it: the barrier after each of these small
operations costs ten times the arithmetic on a machine that is otherwise busy. Partial results are added in the
order of the chunks, so a result does not depend on the number of threads.

Shapes: K targets, C elements of a chunk. Arguments are tensors of one shape and device, any floating dtype.
"""

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from varm_merge.merging.threads import MAX_THREADS, pool
from varm_merge.merging.weights import Normalization, Statistic, relative

__all__ = [
    "Agreement",
    "ElementWeights",
    "Selection",
    "agreement",
    "blend",
    "blend_elements",
    "delta_sums",
    "select",
]

CPU_CHUNK = 1 << 17
ACCELERATOR_CHUNK = 1 << 22
RADIX_BITS = 16

ResultT = TypeVar("ResultT")
_workspace = threading.local()


def delta_sums(
    pivot: Tensor, targets: Sequence[Tensor], statistic: Statistic, selection: "Selection | None"
) -> list[float]:
    """Σ Δ_j² (or Σ |Δ_j|) over the selected elements, for each of the K targets; float64.

    NaN or Inf anywhere in the inputs makes at least one sum non-finite.
    """

    def sums(chunk: _Chunk) -> list[Tensor]:
        deltas_KC = chunk.to_deltas()
        if selection is not None:
            mask_C = selection.mask(deltas_KC, chunk.start)
            for delta_C in deltas_KC:
                delta_C *= mask_C
        return [_measure(delta_C, statistic) for delta_C in deltas_KC]

    return _total(_map_chunks(sums, pivot, targets), len(targets))


@dataclass(frozen=True)
class Agreement:
    """Sums over the elements of a tensor, float64; pairs of targets in the order of ``itertools.combinations``.

    Attributes:
        pivot: Σ θ_v².
        squares: Σ Δ_i² for each target.
        products: Σ Δ_i Δ_j for each pair.
        moved: Elements that both targets of a pair moved.
        opposite: Those among them that the two moved in opposite directions.
    """

    pivot: float
    squares: list[float]
    products: list[float]
    moved: list[float]
    opposite: list[float]


def agreement(pivot: Tensor, targets: Sequence[Tensor]) -> Agreement:
    """How far the K targets moved from the pivot, and how much in the same direction."""
    pairs = list(itertools.combinations(range(len(targets)), 2))

    def sums(chunk: _Chunk) -> list[Tensor]:
        product_C, deltas_KC = chunk.scratch_C[0], chunk.to_deltas()
        squares = [torch.mul(row_C, row_C, out=product_C).sum() for row_C in (chunk.pivot_C, *deltas_KC)]
        products, moved, opposite = [], [], []
        for first, second in pairs:
            torch.mul(deltas_KC[first], deltas_KC[second], out=product_C)
            products.append(product_C.sum())
            moved.append(torch.count_nonzero(product_C).double())
            opposite.append((product_C < 0).sum().double())
        return [*squares, *products, *moved, *opposite]

    sizes = (1, len(targets), len(pairs), len(pairs), len(pairs))
    totals = iter(_total(_map_chunks(sums, pivot, targets, scratch=1), sum(sizes)))
    (pivot_sum,), *others = (list(itertools.islice(totals, size)) for size in sizes)
    return Agreement(pivot_sum, *others)


def blend(
    pivot: Tensor, targets: Sequence[Tensor], weights: Sequence[float], out: Tensor, *, scale: float = 1.0
) -> None:
    """Write pivot + scale · Σ_j W_j (θ_j − pivot) into ``out``; the K weights are ≥ 0 and sum to 1.

    Σ_j W_j θ_j is taken as a chain of linear interpolations with the running share W_j / Σ_{i≤j} W_i: equal
    targets give that target to the bit (but for the sign of a zero), one weight of 1 copies, and no element leaves
    the hull of the targets. The scale is one more interpolation, from the pivot; at 1 the pivot is not read.
    """
    used = [(target, weight) for target, weight in zip(targets, weights, strict=True) if weight > 0]
    (first, first_weight), *others = used
    flat_out = out.view(-1)

    def write(chunk: _Chunk) -> None:
        merged_C, total = chunk.pivot_C, first_weight
        for values_C, (_, weight) in zip(chunk.values_KC, others, strict=False):
            total += weight
            merged_C.lerp_(values_C, weight / total)
        if scale != 1:
            merged_C = chunk.values_KC[-1].lerp_(merged_C, scale)
        flat_out[chunk.start : chunk.stop].copy_(merged_C)

    _map_chunks(write, first, [*(target for target, _ in others), *([] if scale == 1 else [pivot])])


def blend_elements(
    pivot: Tensor,
    targets: Sequence[Tensor],
    weights: "Sequence[float] | ElementWeights",
    out: Tensor,
    *,
    selection: "Selection | None",
    erase_minority: bool,
    scale: float = 1.0,
) -> tuple[list[float], list[float]]:
    """Write the element-wise weighted merge into ``out``; an element that keeps no target keeps the pivot.

    ``weights`` are K numbers, or the rule that makes each element's own; ``scale`` is as in ``blend``. With
    ``erase_minority`` a delta whose sign is not that of the summed delta loses its weight (a zero delta has no
    sign and loses it too; a zero sum counts as positive) and the rest is renormalised: SCE's erase step.
    Returns, for ``ElementWeights`` only, Σ |Δ_j|² (or Σ |Δ_j|) and Σ of the weights over the elements, K each.
    """
    flat_out, count = out.view(-1), len(targets)
    priors = relative((isinstance(weights, ElementWeights) and weights.priors) or [1.0] * count)
    running = [prior / (total or 1.0) for prior, total in zip(priors, itertools.accumulate(priors), strict=True)]
    alone = [prior / (sum(priors) or 1.0) for prior in priors]

    def write(chunk: _Chunk) -> list[Tensor]:
        merged_C, (total_C, share_C, *deltas_KC) = chunk.pivot_C, chunk.scratch_C[: count + 2]
        if scale != 1:
            chunk.scratch_C[-1].copy_(chunk.pivot_C)
        for values_C, delta_C in zip(chunk.values_KC, deltas_KC, strict=True):
            torch.sub(values_C, merged_C, out=delta_C)
        mask_C = None if selection is None else selection.mask(deltas_KC, chunk.start)
        keep_KC = _keep(deltas_KC, total_C, erase_minority, mask_C)
        sums: list[Tensor] = []
        weights_KC = deltas_KC  # the weights take the place of the deltas
        if isinstance(weights, ElementWeights):
            sums = weights.replace(deltas_KC, total_C)
        else:
            for weight_C, weight in zip(weights_KC, weights, strict=True):
                weight_C.fill_(weight)
        if keep_KC:
            if isinstance(weights, ElementWeights):
                _sum(weights_KC, total_C)
                sums += _share_sums(weights_KC, alone, total_C, share_C)
            total_C.zero_()
            for values_C, weight_C, keep_C in zip(chunk.values_KC, weights_KC, keep_KC, strict=True):
                total_C += weight_C.mul_(keep_C)
                merged_C.lerp_(values_C, _share(weight_C, total_C, share_C, 0.0))
        else:
            merged_C = _mean(chunk.values_KC, weights_KC, total_C, share_C, of_nothing=running)
            if isinstance(weights, ElementWeights):  # the last running share is the last weight
                last = share_C.sum()
                middle = _share_sums(weights_KC[1:-1], alone[1:-1], total_C, share_C)
                first = [len(share_C) - sum(middle, start=last)] if count > 1 else []
                sums += [*first, *middle, last]
        if scale != 1:
            merged_C = chunk.scratch_C[-1].lerp_(merged_C, scale)
        flat_out[chunk.start : chunk.stop].copy_(merged_C)
        return sums

    sums = _map_chunks(write, pivot, targets, scratch=count + 2 + (scale != 1))
    both = _total(sums, 2 * count) if isinstance(weights, ElementWeights) else []
    return both[:count], both[count:]


@dataclass(frozen=True)
class ElementWeights:
    """Granularity ``parameter``: the rule of ``weights.normalize`` for each element by itself."""

    statistic: Statistic
    normalization: Normalization
    temperature: float
    priors: tuple[float, ...] = ()

    def replace(self, deltas_KC: list[Tensor], spare_C: Tensor) -> list[Tensor]:
        """Turn K deltas [C] in place into K numbers ≥ 0 that are proportional to the weights.

        All K can be zero at an element that no target moved (``sum``). Returns the sums of the K statistics.
        """
        statistic_sums = [_measure(delta_C, self.statistic) for delta_C in deltas_KC]
        if self.normalization == "softmax":
            mean_C = _sum(deltas_KC, spare_C).div_(len(deltas_KC))
            for delta_C in deltas_KC:
                delta_C.div_(mean_C).div_(self.temperature).nan_to_num_(nan=0.0)
            largest_C = torch.stack(deltas_KC).amax(dim=0)
            for delta_C in deltas_KC:
                delta_C.sub_(largest_C).exp_()
        for delta_C, prior in zip(deltas_KC, relative(self.priors), strict=False):
            if prior != 1:
                delta_C.mul_(prior)
        return statistic_sums


@dataclass(frozen=True)
class Selection:
    """Which elements of one tensor vary most across its targets (SCE's select step).

    Chosen are the elements whose variance, as the bits of a float64, is above ``threshold``, and those equal to
    it at a flat index below ``tie_stop``.
    """

    threshold: int
    tie_stop: int

    def mask(self, deltas_KC: Sequence[Tensor], start: int) -> Tensor:
        """Bool [C] for the chunk that begins at flat index ``start``."""
        bits_C = _variance_bits(deltas_KC)
        chosen_C = bits_C > self.threshold
        if ties := min(max(self.tie_stop - start, 0), len(bits_C)):
            chosen_C[:ties] |= bits_C[:ties] == self.threshold
        return chosen_C


def select(pivot: Tensor, targets: Sequence[Tensor], fraction: float) -> Selection:
    """The selection of the ``fraction`` of a tensor's elements with the highest variance across targets.

    Counted, as mergekit's ``sce`` does, among the elements with a variance above zero and rounded down; ties
    go to the lower index. An exact radix selection over the bits of the variances (non-negative float64s
    order as their bits do), so it needs passes over the tensor, never a copy of it.
    """

    def over_bits(work: Callable[[Tensor], ResultT]) -> list[ResultT]:
        return _map_chunks(lambda chunk: work(_variance_bits(chunk.to_deltas())), pivot, targets)

    varying = sum(int(count) for count in over_bits(torch.count_nonzero))
    wanted = math.floor(varying * Fraction(repr(fraction)))  # 0.29 of 100 is 29, which floats make 28
    if wanted == 0:
        return Selection(threshold=torch.iinfo(torch.int64).max, tie_stop=0)
    prefix, lock = 0, threading.Lock()
    for shift in range(64 - RADIX_BITS, -1, -RADIX_BITS):
        counts = torch.zeros(1 << RADIX_BITS, dtype=torch.int64, device=pivot.device)
        over_bits(partial(_count_digits, counts=counts, lock=lock, prefix=prefix, shift=shift))
        at_least = counts.cpu().numpy()[::-1].cumsum()[::-1]
        digit = int((at_least >= wanted).sum()) - 1
        prefix = (prefix << RADIX_BITS) | digit
        in_bucket = int(counts[digit])
        wanted -= int(at_least[digit]) - in_bucket
        if wanted == in_bucket:
            return Selection(threshold=(prefix << shift) - 1, tie_stop=0)
    tied = over_bits(lambda bits_C: torch.count_nonzero(bits_C == prefix))
    for start, ties in zip(_starts(pivot), tied, strict=True):
        if int(ties) >= wanted:
            chunk = slice(start, start + _chunk_size(pivot))
            pivot_C = pivot.reshape(-1)[chunk].to(torch.float64)
            bits_C = _variance_bits([target.reshape(-1)[chunk] - pivot_C for target in targets])
            last = int(torch.nonzero(bits_C == prefix)[wanted - 1])
            return Selection(threshold=prefix, tie_stop=start + last + 1)
        wanted -= int(ties)
    raise AssertionError("the radix counts promised more ties")


def _count_digits(bits_C: Tensor, counts: Tensor, lock: threading.Lock, prefix: int, shift: int) -> None:
    """Add to ``counts`` how often each value of the 16 bits from ``shift`` up occurs below the bits ``prefix``."""
    digits = bits_C >> shift
    if shift < 64 - RADIX_BITS:
        digits = digits[digits >> RADIX_BITS == prefix]
    own_counts = torch.bincount(digits & ((1 << RADIX_BITS) - 1), minlength=1 << RADIX_BITS)
    with lock:  # one histogram, not one for each chunk; integer sums do not depend on the order
        counts += own_counts


@dataclass(frozen=True)
class _Chunk:
    start: int
    stop: int
    pivot_C: Tensor
    values_KC: list[Tensor]
    scratch_C: list[Tensor]

    def to_deltas(self) -> list[Tensor]:
        """The targets' deltas, in place of their values."""
        return [values_C.sub_(self.pivot_C) for values_C in self.values_KC]


def _map_chunks(
    work: Callable[[_Chunk], ResultT], pivot: Tensor, targets: Sequence[Tensor], *, scratch: int = 0
) -> list[ResultT]:
    """``work`` on every chunk, by several threads on a CPU; results in the order of the chunks.

    A chunk's tensors are float64 and lie in a buffer of the thread that its next chunk overwrites.
    """
    flat_pivot, flat_targets = pivot.reshape(-1), [target.reshape(-1) for target in targets]
    starts, size = _starts(pivot), _chunk_size(pivot)

    @torch.inference_mode()
    def run(own_starts: range) -> list[ResultT]:
        rows = list(_buffer(1 + len(targets) + scratch, size, pivot))
        results = []
        for start in own_starts:
            stop = min(start + size, len(flat_pivot))
            if stop - start < size:
                rows = [row[: stop - start] for row in rows]
            for row, source in zip(rows, (flat_pivot, *flat_targets), strict=False):
                row.copy_(source[start:stop])
            values_KC, scratch_C = rows[1 : 1 + len(targets)], rows[1 + len(targets) :]
            results.append(work(_Chunk(start, stop, rows[0], values_KC, scratch_C)))
        return results

    if pivot.device.type != "cpu":
        return run(starts)
    threads = max(min(torch.get_num_threads(), MAX_THREADS, len(starts)), 1)
    by_thread = list(pool().map(run, [starts[thread::threads] for thread in range(threads)]))
    return [by_thread[index % threads][index // threads] for index in range(len(starts))]


def _starts(pivot: Tensor) -> range:
    return range(0, pivot.numel(), _chunk_size(pivot))


def _chunk_size(pivot: Tensor) -> int:
    return CPU_CHUNK if pivot.device.type == "cpu" else ACCELERATOR_CHUNK


def _buffer(rows: int, size: int, like: Tensor) -> Tensor:
    """[rows, size] of this thread's reused float64 buffer on the device of ``like``."""
    buffers: dict[torch.device, Tensor] = _workspace.__dict__.setdefault("buffers", {})
    size = min(size, max(like.numel(), 1))
    buffer = buffers.get(like.device)
    if buffer is None or buffer.numel() < rows * size:
        buffer = buffers[like.device] = torch.empty(rows * size, dtype=torch.float64, device=like.device)
    return buffer[: rows * size].view(rows, size)


def _measure(delta_C: Tensor, statistic: Statistic) -> Tensor:
    """Replace deltas by their squares (or magnitudes); returns their sum.

    Not by ``torch.dot``, which its library splits over threads of its own.
    """
    return (delta_C.square_() if statistic == "square" else delta_C.abs_()).sum()


def _total(sums: Sequence[Sequence[Tensor]], count: int) -> list[float]:
    """Add up the chunks' sums; zeros for a tensor without elements."""
    if not sums:
        return [0.0] * count
    totals: list[float] = torch.stack([torch.stack(list(chunk_sums)) for chunk_sums in sums]).sum(dim=0).tolist()
    return totals


def _sum(terms_KC: Sequence[Tensor], out_C: Tensor) -> Tensor:
    out_C.copy_(terms_KC[0])
    for term_C in terms_KC[1:]:
        out_C += term_C
    return out_C


def _keep(deltas_KC: list[Tensor], spare_C: Tensor, erase_minority: bool, mask_C: Tensor | None) -> list[Tensor]:
    """Which deltas of a chunk keep their weight: K factors 0 or 1, or none at all where all do.

    Deltas that ``mask_C`` does not select become zero.
    """
    if mask_C is not None:
        for delta_C in deltas_KC:
            delta_C *= mask_C
    if erase_minority:  # a delta that is zero has no sign: what was not selected is erased as well
        majority_C = torch.copysign(torch.ones_like(spare_C), _sum(deltas_KC, spare_C))
        return [(delta_C * majority_C).sign_().clamp_(min=0) for delta_C in deltas_KC]
    return [] if mask_C is None else [mask_C] * len(deltas_KC)


def _share(weight_C: Tensor, total_C: Tensor, out_C: Tensor, of_nothing: float) -> Tensor:
    """weight / total into ``out_C``; ``of_nothing`` where both are zero."""
    return torch.div(weight_C, total_C, out=out_C).nan_to_num_(nan=of_nothing)


def _mean(
    values_KC: Sequence[Tensor], weights_KC: Sequence[Tensor], *scratch: Tensor, of_nothing: Sequence[float]
) -> Tensor:
    """Σ_j w_j θ_j / Σ_j w_j, in place of the first values, by running shares w_j / Σ_{i≤j} w_i.

    ``of_nothing`` are the shares where both are zero. The second scratch becomes the share of the last.
    """
    total_C, share_C = scratch
    merged_C = values_KC[0]
    total_C.copy_(weights_KC[0])
    share_C.fill_(1.0)
    for values_C, weight_C, share in zip(values_KC[1:], weights_KC[1:], of_nothing[1:], strict=True):
        total_C += weight_C
        merged_C.lerp_(values_C, _share(weight_C, total_C, share_C, share))
    return merged_C


def _share_sums(
    weights_KC: Sequence[Tensor], of_nothing_K: Sequence[float], total_C: Tensor, share_C: Tensor
) -> list[Tensor]:
    """The sum over the elements of each weight / total; ``of_nothing_K`` where both are zero."""
    pairs = zip(weights_KC, of_nothing_K, strict=True)
    return [_share(weight_C, total_C, share_C, of_nothing).sum() for weight_C, of_nothing in pairs]


def _variance_bits(deltas_KC: Sequence[Tensor]) -> Tensor:
    """K² times the variance over the targets of each element, the bits of non-negative float64s, int64 [C].

    As Σ_{i<j} (Δ_i − Δ_j)²: without a rounded mean, so that deltas which differ only in their order tie.
    """
    spread_C, difference_C = torch.zeros_like(deltas_KC[0]), torch.empty_like(deltas_KC[0])
    for one_C, other_C in itertools.combinations(deltas_KC, 2):
        torch.sub(one_C, other_C, out=difference_C)
        spread_C.addcmul_(difference_C, difference_C)
    return spread_C.view(torch.int64)
