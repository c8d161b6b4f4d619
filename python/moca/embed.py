"""Embedding: text, images and interleaved lists to unit vectors, packed; an index; search in it.

B documents, D dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from moca.checkpoint import replacing
from moca.config import ConfigError, EmbedConfig
from moca.data.encode import Encoded, Encoder
from moca.data.packing import pack
from moca.data.records import IMAGE_MARKER, Document
from moca.data.sources import load_documents
from moca.model import MocaModel, resolve_precision

EMBEDDINGS, INDEX = "embeddings.parquet", "index.json"
# Documents that are encoded together and sorted by length before they are packed.
WINDOW = 512


class Embedder:
    """Embeds documents with a saved model.

    Args:
        model: a loaded model; see `from_pretrained` for a folder or a hub name.
        max_length: most tokens of a document. Text past it is cut, an image that does not fit is
            left out whole; both are counted in `counts`.
        batch_tokens: most tokens of one packed forward; a longer document goes alone.
        precision: of the products of a model whose weights are float32: "fp32", "bf16", or "auto"
            for bf16 where the hardware multiplies it. Other weights are used as they are.
    """

    def __init__(
        self,
        model: MocaModel,
        max_length: int = 1280,
        batch_tokens: int = 8192,
        precision: str = "auto",
    ) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.mixed = resolve_precision(precision) == "bf16" and model.vlm.dtype == torch.float32
        self.encoder = Encoder(model.tokenizer, model.image_settings, max_length)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_length: int = 1280,
        batch_tokens: int = 8192,
        precision: str = "auto",
    ) -> Embedder:
        """Load a saved model directory, or a Qwen-VL checkpoint from the hub.

        Args:
            path: the directory or hub name.
            device: default a GPU if there is one, else the CPU.
            dtype: of the weights; default that of the file.
            max_length, batch_tokens, precision: as in the class.
        """
        model = MocaModel.from_pretrained(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = model.to(device=device, dtype=dtype) if dtype else model.to(device)
        return cls(model.eval(), max_length, batch_tokens, precision)

    @property
    def counts(self) -> dict[str, int]:
        """What was cut or left out so far: "documents truncated", "images dropped"."""
        return dict(self.encoder.counts)

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.model.hidden_size

    def encode(
        self, items: Sequence[Any] | Any, *, prompt: str = "", progress: bool = False
    ) -> np.ndarray:
        """Embed documents.

        Args:
            items: a list; each item is text, a PIL image, a path (os.PathLike) or bytes of an
                image, a list of these (interleaved), {"text", "image"}, or a `Document`. A single
                item that is no list is taken as a list of one.
            prompt: text put before each item.
            progress: show a progress bar.

        Returns:
            (B, D) float32 unit vectors, in the order of the items.

        Raises:
            ValueError: an empty document or an unreadable image, by its number.
            TypeError: an item of another type.
        """
        if not isinstance(items, (list, tuple)):
            items = [items]
        documents = [self._document(item, prompt, i) for i, item in enumerate(items)]
        result = np.zeros((len(documents), self.dimension), np.float32)
        with tqdm(total=len(documents), desc="embedding", unit="doc", disable=not progress) as bar:
            for begin in range(0, len(documents), WINDOW):
                window = [self.encoder(document) for document in documents[begin : begin + WINDOW]]
                for rows in _packs(window, self.batch_tokens):
                    embeddings = self._forward([window[row] for row in rows])
                    result[[begin + row for row in rows]] = embeddings
                    bar.update(len(rows))
        return result

    def _document(self, item: Any, prompt: str, number: int) -> Document:
        document = Document.of(item, f"item {number}")
        if document.empty:
            raise ValueError(f"item {number}: the document is empty")
        return Document.of([prompt, document], document.name) if prompt else document

    @torch.inference_mode()
    def _forward(self, encoded: list[Encoded]) -> np.ndarray:
        merge_size, image_token = self.encoder.merge_size, self.encoder.image_token_id
        batch = pack(encoded, merge_size, image_token).to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed):
            return self.model.embed(batch).float().cpu().numpy()


def _packs(encoded: list[Encoded], budget: int) -> Iterable[list[int]]:
    """Rows of similar length whose tokens sum to at most the budget."""
    rows: list[int] = []
    room = budget
    for row in sorted(range(len(encoded)), key=lambda row: -len(encoded[row])):
        if rows and len(encoded[row]) > room:
            yield rows
            rows, room = [], budget
        rows.append(row)
        room -= len(encoded[row])
    if rows:
        yield rows


@dataclass(frozen=True)
class Hit:
    """A found document: cosine similarity, its name, and the beginning of its text."""

    score: float
    name: str
    text: str


def build_index(config: EmbedConfig) -> int:
    """Embed a source into the folder `config.output`; returns how many documents it holds.

    The folder holds embeddings.parquet (name, text, images, embedding) and index.json (the model).

    Raises:
        ConfigError: the folder exists, or the source holds no documents.
    """
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"output: {output} exists; give another folder")
    documents = list(load_documents(config.source, on_error=config.on_error))
    if not documents:
        raise ConfigError(f"source: {config.source} holds no documents")
    embedder = Embedder.from_pretrained(
        config.model,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        precision=config.precision,
    )
    embeddings = embedder.encode(documents, progress=True)
    dimension = embeddings.shape[1]
    table = pa.table({
        "name": [document.name for document in documents],
        "text": [document.text for document in documents],
        "images": pa.array([_image_names(document) for document in documents],
                           pa.list_(pa.string())),
        "embedding": pa.FixedSizeListArray.from_arrays(embeddings.ravel(), dimension),
    })  # fmt: skip
    with replacing(output) as folder:
        pq.write_table(table, folder / EMBEDDINGS)
        about = {"model": str(Path(config.model).resolve()) if Path(config.model).exists()
                 else config.model, "source": config.source, "dimension": dimension,
                 "max_length": config.max_length, "precision": config.precision,
                 **embedder.counts}  # fmt: skip
        (folder / INDEX).write_text(json.dumps(about, indent=1), encoding="utf-8")
    for reason, count in embedder.counts.items():
        tqdm.write(f"{count} {reason} at max_length {config.max_length}")
    return len(documents)


def search(folder: str | PathLike, query: str, k: int = 5) -> list[Hit]:
    """The `k` documents of an index nearest to a query, best first.

    Raises:
        ConfigError: the folder is no index written by `moca embed`, or k is below 1.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file() or not (folder / EMBEDDINGS).is_file():
        raise ConfigError(
            f"{folder} is no index: expected {EMBEDDINGS} and {INDEX} in it; make one with "
            f"`moca embed model=MODEL source=DOCUMENTS output={folder}`"
        )
    if k < 1:
        raise ConfigError(f"k: expected at least 1, got {k}")
    about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    table = pq.read_table(folder / EMBEDDINGS)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    embedder = Embedder.from_pretrained(
        about["model"], max_length=about["max_length"], precision=about["precision"]
    )
    scores = vectors.reshape(-1, about["dimension"]) @ embedder.encode([query])[0]
    best = np.argsort(-scores, kind="stable")[:k]
    names, texts = table["name"].to_pylist(), table["text"].to_pylist()
    return [Hit(float(scores[i]), names[i], _snippet(texts[i])) for i in best]


def _image_names(document: Document) -> list[str]:
    return [str(i) if isinstance(i, (str, PathLike)) else "(inline)" for i in document.images]


def _snippet(text: str, length: int = 160) -> str:
    line = " ".join(text.replace(IMAGE_MARKER, "[image]").split())
    return line if len(line) <= length else line[: length - 1] + "…"
