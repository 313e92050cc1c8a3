"""Chunked reductions and weighted sums over one pivot tensor and its K targets; torch only.

On a CPU a reduction with fresh temporaries spends its time in the allocator, not in the arithmetic. So every
pass here walks the flat tensors in chunks that stay in cache and works in reused float64 buffers. Float64 makes
the rules of the method free: squares of the smallest float32 delta do not underflow, sums over 10⁹ elements
lose nothing, and a result is rounded once, to the output's dtype.

Threads take whole chunks; torch's own splitting of each operation is switched off meanwhile. It would meet at
a barrier after every one of these small operations, and on a machine that does anything else at the same time
the barriers cost ten times the arithmetic. Partial results are added in the order of the chunks, so a result
does not depend on the number of threads.

Shapes: K targets, C elements of a chunk. Arguments are tensors of one shape and device, any floating dtype.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from varm_merge.weights import Normalization, Statistic

__all__ = ["ElementWeights", "Selection", "blend", "blend_elements", "delta_sums", "select"]

CPU_CHUNK = 1 << 17
ACCELERATOR_CHUNK = 1 << 22
MAX_THREADS = 8
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


def blend(targets: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Write Σ_j W_j θ_j into ``out``; the K weights are ≥ 0 and sum to 1.

    Taken as a chain of linear interpolations with the running share W_j / Σ_{i≤j} W_i: equal targets give
    that target to the bit, one weight of 1 copies, and no element leaves the hull of the targets.
    """
    used = [(target, weight) for target, weight in zip(targets, weights, strict=True) if weight > 0]
    flat_out = out.view(-1)

    def write(chunk: _Chunk) -> None:
        merged_C, total = chunk.pivot_C, used[0][1]
        for values_C, (_, weight) in zip(chunk.values_KC, used[1:], strict=True):
            total += weight
            merged_C.lerp_(values_C, weight / total)
        flat_out[chunk.start : chunk.stop].copy_(merged_C)

    _map_chunks(write, used[0][0], [target for target, _ in used[1:]])


def blend_elements(
    pivot: Tensor,
    targets: Sequence[Tensor],
    weights: "Sequence[float] | ElementWeights",
    out: Tensor,
    *,
    selection: "Selection | None",
    erase_minority: bool,
) -> tuple[list[float], list[float]]:
    """Write the element-wise weighted merge into ``out``; an element that keeps no target keeps the pivot.

    ``weights`` are K numbers, or the rule that makes each element's own. With ``erase_minority`` a delta whose
    sign is not that of the summed delta loses its weight (a zero delta has no sign and loses it too; a zero sum
    counts as positive) and the rest is renormalised: SCE's erase step.
    Returns, for ``ElementWeights`` only, Σ |Δ_j|² (or Σ |Δ_j|) and Σ of the weights over the elements, K each.
    """
    flat_out, count = out.view(-1), len(targets)

    def write(chunk: _Chunk) -> list[Tensor]:
        merged_C, (total_C, share_C, *deltas_KC) = chunk.pivot_C, chunk.scratch_C
        for values_C, delta_C in zip(chunk.values_KC, deltas_KC, strict=True):
            torch.sub(values_C, merged_C, out=delta_C)
        keep_KC: list[Tensor] = []
        if selection is not None:
            mask_C = selection.mask(deltas_KC, chunk.start)
            keep_KC = [mask_C] * count
            for delta_C in deltas_KC:
                delta_C *= mask_C
        if erase_minority:  # a masked delta is zero, so it is erased as well
            majority_C = torch.copysign(torch.ones_like(total_C), _sum(deltas_KC, total_C))
            keep_KC = [(delta_C * majority_C).sign_().clamp_(min=0) for delta_C in deltas_KC]
        sums: list[Tensor] = []
        if isinstance(weights, ElementWeights):
            sums = weights.replace(deltas_KC, total_C)
        else:
            for delta_C, weight in zip(deltas_KC, weights, strict=True):
                delta_C.fill_(weight)
        for weight_C, keep_C in zip(deltas_KC, keep_KC, strict=False):
            weight_C *= keep_C
        total_C.zero_()
        for values_C, weight_C in zip(chunk.values_KC, deltas_KC, strict=True):
            total_C += weight_C
            merged_C.lerp_(values_C, torch.div(weight_C, total_C, out=share_C).nan_to_num_(nan=0.0))
        flat_out[chunk.start : chunk.stop].copy_(merged_C)
        return sums

    sums = _map_chunks(write, pivot, targets, scratch=count + 2)
    if not isinstance(weights, ElementWeights):
        return [], []
    totals = _total(sums, 2 * count)
    return totals[:count], totals[count:]


@dataclass(frozen=True)
class ElementWeights:
    """Granularity ``parameter``: the rule of ``weights.normalize`` for each element by itself."""

    statistic: Statistic
    normalization: Normalization
    temperature: float

    def replace(self, deltas_KC: list[Tensor], total_C: Tensor) -> list[Tensor]:
        """Turn K deltas [C] into K weights [C] in place; uniform weights where no target moved.

        Returns 2·K sums over the chunk: of the statistics, then of the weights. ``total_C`` is overwritten.
        """
        targets = len(deltas_KC)
        for delta_C in deltas_KC:
            _ = delta_C.square_() if self.statistic == "square" else delta_C.abs_()
        statistic_sums = [delta_C.sum() for delta_C in deltas_KC]
        _sum(deltas_KC, total_C)
        if self.normalization == "softmax":
            mean_C = total_C.mul_(self.temperature / targets)
            for delta_C in deltas_KC:
                delta_C.div_(mean_C).nan_to_num_(nan=0.0)
            largest_C = torch.stack(deltas_KC).amax(dim=0)
            for delta_C in deltas_KC:
                delta_C.sub_(largest_C).exp_()
            _sum(deltas_KC, total_C)
        for delta_C in deltas_KC:
            delta_C.div_(total_C).nan_to_num_(nan=1 / targets)
        return statistic_sums + [delta_C.sum() for delta_C in deltas_KC]


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

    def over_bits(work: Callable[[Tensor], ResultT]) -> list[ResultT]:
        return _map_chunks(lambda chunk: work(_variance_bits(chunk.to_deltas())), pivot, targets)

    wanted = int(sum(int(count) for count in over_bits(torch.count_nonzero)) * fraction)
    if wanted == 0:
        return Selection(threshold=torch.iinfo(torch.int64).max, tie_stop=0)
    prefix = 0
    for shift in range(64 - RADIX_BITS, -1, -RADIX_BITS):
        counts = torch.zeros(1 << RADIX_BITS, dtype=torch.int64, device=pivot.device)
        for partial_counts in over_bits(partial(_count_digits, prefix=prefix, shift=shift)):
            counts += partial_counts
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1
        prefix = (prefix << RADIX_BITS) | digit
        in_bucket = int(counts[digit])
        wanted -= int(at_least[digit]) - in_bucket
        if wanted == in_bucket:
            return Selection(threshold=(prefix << shift) - 1, tie_stop=0)
    tied = over_bits(lambda bits_C: torch.nonzero(bits_C == prefix).view(-1))
    for start, ties in zip(_starts(pivot), tied, strict=True):
        if len(ties) >= wanted:
            return Selection(threshold=prefix, tie_stop=start + int(ties[wanted - 1]) + 1)
        wanted -= len(ties)
    raise AssertionError("the radix counts promised more ties")


def _count_digits(bits_C: Tensor, prefix: int, shift: int) -> Tensor:
    """How often each value of the 16 bits from ``shift`` up occurs below the higher bits ``prefix``."""
    digits = bits_C >> shift
    if shift < 64 - RADIX_BITS:
        digits = digits[digits >> RADIX_BITS == prefix]
    return torch.bincount(digits & ((1 << RADIX_BITS) - 1), minlength=1 << RADIX_BITS)


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

    threads = min(torch.get_num_threads(), MAX_THREADS, len(starts))
    if pivot.device.type != "cpu":
        return run(starts)
    with _serial_operations():
        if threads <= 1:
            return run(starts)
        by_thread = list(_pool().map(run, [starts[thread::threads] for thread in range(threads)]))
    return [by_thread[index % threads][index // threads] for index in range(len(starts))]


def _starts(pivot: Tensor) -> range:
    return range(0, pivot.numel(), _chunk_size(pivot))


def _chunk_size(pivot: Tensor) -> int:
    return CPU_CHUNK if pivot.device.type == "cpu" else ACCELERATOR_CHUNK


@contextmanager
def _serial_operations() -> Iterator[None]:
    """Keep torch from splitting operations over threads of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="varm-merge")


def _buffer(rows: int, size: int, like: Tensor) -> Tensor:
    """[rows, size] of this thread's reused float64 buffer on the device of ``like``."""
    buffers: dict[torch.device, Tensor] = _workspace.__dict__.setdefault("buffers", {})
    size = min(size, max(like.numel(), 1))
    buffer = buffers.get(like.device)
    if buffer is None or buffer.numel() < rows * size:
        buffer = buffers[like.device] = torch.empty(rows * size, dtype=torch.float64, device=like.device)
    return buffer[: rows * size].view(rows, size)


def _measure(delta_C: Tensor, statistic: Statistic) -> Tensor:
    return torch.dot(delta_C, delta_C) if statistic == "square" else delta_C.abs_().sum()


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


def _variance_bits(deltas_KC: Sequence[Tensor]) -> Tensor:
    """Variance over the targets of each element, the bits of non-negative float64s, int64 [C]."""
    mean_C = _sum(deltas_KC, torch.empty_like(deltas_KC[0])).div_(len(deltas_KC))
    variance_C = torch.zeros_like(mean_C)
    for delta_C in deltas_KC:
        centred_C = delta_C - mean_C
        variance_C.addcmul_(centred_C, centred_C)
    return variance_C.view(torch.int64)
