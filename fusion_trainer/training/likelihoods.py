"""Approximate likelihood matching (ALM; arXiv 2503.20083): a chunk of text is as likely to the student as to its
teacher.

A chunk is the text between two boundaries that both tokenizers have (``alignment.chunks``). With T and S the
teacher's and the student's −log p of the chunk, each side is a distribution over two outcomes, this text or any
other, with the probability p^(1/τ). A chunk's term is τ times the forward KL of the two:

    τ·(a·log(a/b) + (1 − a)·log((1 − a)/(1 − b))),  a = exp(−T/τ),  b = exp(−S/τ)

For a large τ this is S − T + T·log(T/S). It is 0 where S = T. Its slope in S is 1 − T/S: where the teacher is
certain it is that of the cross-entropy, and it is negative where the student is more certain than the teacher. The
published method can also weigh chunks by how much their last token says about what follows; this one takes all.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_trainer.representations.store import Representation

__all__ = ["ChunkRows", "Chunks", "alm", "chunks_of"]

CERTAIN = 1e-4
"""Nats added to both sides. A float32 logit of size 20 is known to 2e-6, so −log p near 0 is mostly rounding."""


class ChunkRows(NamedTuple):
    """The chunks of one block, N in all."""

    first: NDArray[np.int64]  # [N], the first supervised position of each
    size: NDArray[np.int64]  # [N], its number of positions
    logprob: NDArray[np.float32]  # [N], of its teacher
    weight: NDArray[np.float32]  # [N], the teacher's share of the fused distribution at the first position


class Chunks(NamedTuple):
    """The chunks of a batch, N in all; E is the sum of their sizes."""

    first: Tensor  # int64 [N], the first supervised position of each
    positions: Tensor  # int64 [E], the supervised positions of all chunks
    chunk: Tensor  # int64 [E], the chunk of each of them
    logprob: Tensor  # float32 [N], of its teacher
    weight: Tensor  # float32 [N]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Chunks | None":
        """Those of a collated batch; None if it has none."""
        return cls(*(batch[f"chunk_{name}"] for name in cls._fields)) if "chunk_first" in batch else None


def chunks_of(rows: list[Representation], shares_PM: NDArray[np.float32]) -> ChunkRows:
    """The chunks that a block learns: those of each model with a share in the fusion.

    Args:
        rows: The pivot's own row, whose tokens are a chunk each, and the sources' rows, P positions each.
        shares_PM: The models' shares, from ``fuse``.
    """
    parts = []
    for row, share_P in zip(rows, shares_PM.T, strict=True):
        if row.chunk_size is None or row.chunk_logprob is None:
            sizes_P, logprobs_P = np.ones(len(row), np.uint16), row.gold_logprob
        else:
            sizes_P, logprobs_P = row.chunk_size, row.chunk_logprob
        first = np.flatnonzero((sizes_P > 0) & (share_P > 0))
        parts.append((first, sizes_P[first], logprobs_P[first], share_P[first]))
    first, size, logprob, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ChunkRows(first, size.astype(np.int64), logprob.astype(np.float32), weight)


def alm(nll_S: Tensor, chunks: Chunks, temperature: float) -> Tensor:
    """The chunks' terms, each at its first position, float32 [S].

    Args:
        nll_S: The student's −log p of the next token at each supervised position.
        chunks: The chunks of these positions.
        temperature: τ.
    """
    nll_N = torch.zeros_like(chunks.logprob).index_add(0, chunks.chunk, nll_S[chunks.positions])
    student_N = (nll_N.clamp_min(0.0) + CERTAIN) / temperature
    teacher_N = (CERTAIN - chunks.logprob) / temperature
    others_N = _log_1m_exp(teacher_N) - _log_1m_exp(student_N)
    term_N = (-teacher_N).exp() * (student_N - teacher_N) - torch.expm1(-teacher_N) * others_N
    return torch.zeros_like(nll_S).index_add(0, chunks.first, temperature * chunks.weight * term_N)


def _log_1m_exp(x: Tensor) -> Tensor:
    """log(1 − exp(−x)) for x > 0."""
    return (-torch.expm1(-x)).log()
