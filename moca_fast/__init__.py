"""moca_fast: packed multimodal-embedding ops (MoCa, arXiv 2506.23115) on native kernels.

Dims used throughout: B documents, T packed tokens, H / Hkv query / key-value heads, D dim,
N patches, P values a patch, V vocabulary, M gathered documents (or masked patches).
"""

from moca_fast._dispatch import backends, explain, use_backend
from moca_fast.ops.masked_patch_mse.op import masked_patch_mse

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "explain", "masked_patch_mse", "use_backend"]
