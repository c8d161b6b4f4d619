"""moca_fast: packed multimodal-embedding ops (MoCa, arXiv 2506.23115) on native kernels.

Dims used throughout: B documents, T packed tokens, H / Hkv query / key-value heads, D dim,
N patches, P values a patch, V vocabulary, M gathered documents (or masked patches).
"""

from moca_fast import nn
from moca_fast._dispatch import backends, explain, use_backend
from moca_fast._memory import empty_cache
from moca_fast.flash_attn import flash_attn_varlen_func
from moca_fast.ops.attention.op import attention
from moca_fast.ops.info_nce.op import info_nce
from moca_fast.ops.linear_cross_entropy.op import linear_cross_entropy
from moca_fast.ops.masked_patch_mse.op import masked_patch_mse
from moca_fast.ops.mrope.op import mrope
from moca_fast.ops.patchify.op import CLIP_MEAN, CLIP_STD, patchify
from moca_fast.ops.pool.op import pool
from moca_fast.span_mask import SpanMask

__version__ = "0.1.0"

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "SpanMask",
    "__version__",
    "attention",
    "backends",
    "empty_cache",
    "explain",
    "flash_attn_varlen_func",
    "info_nce",
    "linear_cross_entropy",
    "masked_patch_mse",
    "mrope",
    "nn",
    "patchify",
    "pool",
    "use_backend",
]
