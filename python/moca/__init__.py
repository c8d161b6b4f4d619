"""The MoCa system: data, model, the two training stages, embedding and evaluation.

`moca.Embedder` embeds; `moca.Document` and `moca.Pair` are what data is made of. They are loaded
when first used, so that reading a configuration does not load a deep-learning framework.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Document": "moca.data.records",
    "Embedder": "moca.embed",
    "MocaModel": "moca.model",
    "Pair": "moca.data.records",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moca' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
