"""pool in Triton: the tokens are cut into equal chunks, wherever documents begin, so that programs
do equal work. A document inside one chunk is finished there; of one that is cut, each chunk leaves
a sum, and a second kernel adds these in order.

B documents, T packed tokens, D dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moca_triton.device import unsupported_tensors

EPSILON = tl.constexpr(1e-12)  # least length divided by, as in moca_fast's reference
TILE = 16384  # values that a program holds at once: 32 a thread
WARPS = 16
MAX_DIM = 8192  # dims of the widest row that fits the registers of one program
LEAST_CHUNK = 16  # tokens; fewer would leave more sums of cut documents than tokens are worth
CHUNKS = 512  # programs that are enough for the largest GPU, if there are as many tokens


def unsupported(hidden: Tensor, cu_seqlens: Tensor) -> str | None:
    if hidden.shape[1] > MAX_DIM:
        return f"{hidden.shape[1]} dims; the kernel holds at most {MAX_DIM}"
    return unsupported_tensors(hidden, cu_seqlens)


def forward(
    hidden: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    hidden, cu_seqlens = hidden.contiguous(), cu_seqlens.contiguous()
    (tokens, dim), documents = hidden.shape, cu_seqlens.shape[0] - 1
    pooled = hidden.new_empty((documents, dim), dtype=torch.float32)
    norm = hidden.new_empty(documents, dtype=torch.float32)
    if documents == 0:
        return pooled, norm
    chunk, chunks, tile = _tiles(tokens, dim)
    # A chunk cuts at most two documents: the first of its tokens' and the last.
    partial = hidden.new_empty((chunks, 2, dim) if mean else (0,), dtype=torch.float32)
    if mean and chunks:
        _mean_kernel[(chunks,)](
            hidden, cu_seqlens, partial, pooled, norm,
            documents, tokens, dim, normalize, chunk, **tile,
        )  # fmt: skip
    _finish_kernel[(documents,)](
        hidden, cu_seqlens, partial, pooled, norm, tokens, dim, mean, normalize, chunk, **tile
    )
    return pooled, norm


def backward(
    d_pooled: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    norm: Tensor,
    mean: bool,
    normalize: bool,
) -> Tensor:
    (tokens, dim), documents = hidden.shape, cu_seqlens.shape[0] - 1
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    chunk, chunks, tile = _tiles(tokens, dim)
    if chunks:
        _backward_kernel[(chunks,)](
            d_pooled.contiguous(), cu_seqlens.contiguous(), pooled, norm, d_hidden,
            documents, tokens, dim, mean, normalize, chunk, **tile,
        )  # fmt: skip
    return d_hidden


def _tiles(tokens: int, dim: int) -> tuple[int, int, dict[str, int]]:
    """Tokens of a chunk, the number of chunks, and the tokens and dims held at once."""
    chunk = max(LEAST_CHUNK, triton.next_power_of_2(triton.cdiv(tokens, CHUNKS)))
    block_d = max(triton.next_power_of_2(dim), 16)
    block_t = min(max(1, TILE // block_d), chunk)
    sizes = {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": WARPS}
    return chunk, triton.cdiv(tokens, chunk), sizes


@triton.jit
def _document_of(cu_seqlens_ptr, documents, token):
    """The first document that ends after `token`; `documents` if none does."""
    low = token * 0
    high = low + documents
    while low < high:
        middle = (low + high) // 2
        after = tl.load(cu_seqlens_ptr + middle + 1) > token
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle + 1)
    return low


@triton.jit
def _store_vector(
    total, count, document, pooled_ptr, norm_ptr, offs_d, DIM: tl.constexpr, NORMALIZE: tl.constexpr
):
    """Stores total / count, brought to unit length with NORMALIZE, and what it was divided by."""
    vector = tl.div_rn(total, count.to(tl.float32))
    norm = 1.0
    if NORMALIZE:
        length = tl.sqrt_rn(tl.sum(vector * vector, axis=0))
        norm = tl.where(length < EPSILON, EPSILON, length)  # NaN stays NaN
        vector = tl.div_rn(vector, norm)
    tl.store(pooled_ptr + document.to(tl.int64) * DIM + offs_d, vector, offs_d < DIM)
    tl.store(norm_ptr + document, norm)


@triton.jit(do_not_specialize=["documents", "tokens"])
def _mean_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    partial_ptr,
    pooled_ptr,
    norm_ptr,
    documents,
    tokens,
    DIM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk: vectors of the documents inside it, sums of those that are cut."""
    pid = tl.program_id(0)
    begin = pid * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    offs_d = tl.arange(0, BLOCK_D)
    document = _document_of(cu_seqlens_ptr, documents, begin)
    token = begin
    while (token < end) & (document < documents):
        first = tl.load(cu_seqlens_ptr + document)
        last = tl.load(cu_seqlens_ptr + document + 1)
        stop = tl.maximum(tl.minimum(last, end), token)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(token, stop, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            mask = (offs_t < stop)[:, None] & (offs_d < DIM)[None, :]
            rows = offs_t.to(tl.int64)[:, None] * DIM + offs_d[None, :]
            total += tl.sum(tl.load(hidden_ptr + rows, mask, other=0.0).to(tl.float32), axis=0)
        if (first >= begin) & (last <= end):
            if stop > token:
                _store_vector(
                    total, stop - token, document, pooled_ptr, norm_ptr, offs_d, DIM, NORMALIZE
                )
        else:
            side = (token > begin).to(tl.int64)  # 0: it goes on from the chunk before, or fills all
            tl.store(partial_ptr + (pid * 2 + side) * DIM + offs_d, total, offs_d < DIM)
        token = stop
        document += 1


@triton.jit(do_not_specialize=["tokens"])
def _finish_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    partial_ptr,
    pooled_ptr,
    norm_ptr,
    tokens,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One document, unless it lies inside a chunk: the sum of its chunks, or its last token."""
    document = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + document)
    end = tl.load(cu_seqlens_ptr + document + 1)
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.maximum(end - begin, 1) if MEAN else tl.full((), 1, tl.int32)
    # There is no waiting for the device to raise an error: a document that cannot be is NaN.
    wrong = (begin < 0) | (end < begin) | (end > tokens) | ((document == 0) & (begin != 0))
    here = True
    if wrong:
        total += float("nan")
    elif end > begin:
        if MEAN:
            first, last = begin // CHUNK, (end - 1) // CHUNK
            here = first < last
            if here:
                for start in range(first, last + 1, BLOCK_T):
                    offs_c = start + tl.arange(0, BLOCK_T)
                    side = ((offs_c == first) & (begin > first * CHUNK)).to(tl.int64)
                    mask = (offs_c <= last)[:, None] & (offs_d < DIM)[None, :]
                    rows = (offs_c * 2 + side)[:, None] * DIM + offs_d[None, :]
                    total += tl.sum(tl.load(partial_ptr + rows, mask, other=0.0), axis=0)
        else:
            row = (end - 1).to(tl.int64) * DIM
            total += tl.load(hidden_ptr + row + offs_d, offs_d < DIM, other=0.0).to(tl.float32)
    if here:
        _store_vector(total, count, document, pooled_ptr, norm_ptr, offs_d, DIM, NORMALIZE)


@triton.jit
def _token_gradient(
    d_pooled_ptr,
    pooled_ptr,
    norm_ptr,
    document,
    count,
    offs_d,
    DIM: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """(BLOCK_D,) float32 gradient of each token that is pooled into a document."""
    row = document.to(tl.int64) * DIM + offs_d
    gradient = tl.load(d_pooled_ptr + row, offs_d < DIM, other=0.0)
    norm = tl.load(norm_ptr + document)
    if NORMALIZE:
        pooled = tl.load(pooled_ptr + row, offs_d < DIM, other=0.0)
        along = tl.sum(pooled * gradient, axis=0)
        along = tl.where(norm <= EPSILON, 0.0, along)  # below it the divisor is a constant
        gradient -= along * pooled
    return tl.div_rn(gradient, norm * count)


@triton.jit(do_not_specialize=["documents", "tokens"])
def _backward_kernel(
    d_pooled_ptr,
    cu_seqlens_ptr,
    pooled_ptr,
    norm_ptr,
    d_hidden_ptr,
    documents,
    tokens,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of one chunk's tokens, those past the last document included."""
    begin = tl.program_id(0) * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    offs_d = tl.arange(0, BLOCK_D)
    document = _document_of(cu_seqlens_ptr, documents, begin)
    token = begin
    while (token < end) & (document < documents):
        first = tl.load(cu_seqlens_ptr + document)
        last = tl.load(cu_seqlens_ptr + document + 1)
        stop = tl.maximum(tl.minimum(last, end), token)
        count = tl.maximum(last - first, 1).to(tl.float32) if MEAN else 1.0
        gradient = _token_gradient(
            d_pooled_ptr, pooled_ptr, norm_ptr, document, count, offs_d, DIM, NORMALIZE
        )
        for start in range(token, stop, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            pooled_here = (offs_t == last - 1) | MEAN
            value = tl.where(pooled_here[:, None], gradient[None, :], 0.0)
            mask = (offs_t < stop)[:, None] & (offs_d < DIM)[None, :]
            rows = offs_t.to(tl.int64)[:, None] * DIM + offs_d[None, :]
            tl.store(d_hidden_ptr + rows, value, mask)
        token = stop
        document += 1
    for start in range(token, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t < end)[:, None] & (offs_d < DIM)[None, :]
        rows = offs_t.to(tl.int64)[:, None] * DIM + offs_d[None, :]
        tl.store(d_hidden_ptr + rows, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), mask)
