"""Embedding: text, images and interleaved lists to unit vectors, packed; an index; search in it.

B documents, D dim.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from moca.checkpoint import new_output, replacing
from moca.config import ConfigError, EmbedConfig
from moca.console import printable
from moca.data.encode import Encoded, Encoder
from moca.data.packing import batches_by_cost, pack
from moca.data.prompts import prompted
from moca.data.records import IMAGE_MARKER, Document
from moca.data.sources import Check, load_documents
from moca.model import MocaModel, resolve_precision
from moca.saving import model_digest, read_directory

EMBEDDINGS, INDEX = "embeddings.parquet", "index.json"
# What index.json holds at the least; beside it stand the source and what was cut.
ABOUT = {
    "model": str,
    "model_digest": str,  # vectors of one model say nothing to another
    "documents": int,
    "dimension": int,
    "max_length": int,
    "precision": str,
    "document_prompt": str,
    "query_prompt": str,
}
# Documents that are encoded together and sorted by length before they are packed.
WINDOW = 512


class Embedder:
    """Embeds documents with a saved model.

    Args:
        model: a loaded model; see `from_pretrained` for a folder or a hub name.
        max_length: most tokens of a document. Text past it is cut, an image that does not fit is
            left out whole; both are counted in `counts`.
        batch_tokens: most tokens of one packed forward; a longer document goes alone.
        precision: of the products: "fp32", of float32 weights alone; "bf16", of these or bfloat16;
            or "auto", by which float32 weights are multiplied in bf16 where the hardware does that,
            and others are used as they are.

    Raises:
        ValueError: max_length or batch_tokens below 1, an unknown precision, or one that needs
            other weights.
    """

    def __init__(
        self,
        model: MocaModel,
        max_length: int = 1280,
        batch_tokens: int = 8192,
        precision: str = "auto",
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
        self.model = model
        self.batch_tokens = batch_tokens
        self.mixed = resolve_precision(precision) == "bf16" and model.vlm.dtype == torch.float32
        fitting = {"fp32": (torch.float32,), "bf16": (torch.float32, torch.bfloat16)}
        if precision in fitting and model.vlm.dtype not in fitting[precision]:
            raise ValueError(
                f"precision {precision}: expected weights of {fitting[precision]}, got "
                f"{model.vlm.dtype}"
            )
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
            dtype: of the weights; default float32 for precision "fp32", else that of the file.
            max_length, batch_tokens, precision: as in the class.
        """
        if dtype is None and precision == "fp32":
            dtype = torch.float32
        model = MocaModel.from_pretrained(path, dtype=dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), max_length, batch_tokens, precision)

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
            prompt: wording around each item; see `moca.data.prompts`. Plain text goes before it.
            progress: show a progress bar.

        Returns:
            (B, D) float32 unit vectors, in the order of the items.

        Raises:
            ValueError: an empty document, an unreadable image or an embedding that is not finite;
                names the document, or gives its number. A prompt of another form.
            TypeError: an item of another type.
        """
        if not isinstance(items, (list, tuple)):
            items = [items]
        documents = [self._document(item, prompt, i) for i, item in enumerate(items)]
        result = np.zeros((len(documents), self.dimension), np.float32)
        with tqdm(total=len(documents), desc="embedding", unit="doc", disable=not progress) as bar:
            for begin in range(0, len(documents), WINDOW):
                window = [self.encoder(document) for document in documents[begin : begin + WINDOW]]
                lengths = [min(len(encoded), self.batch_tokens) for encoded in window]
                for rows in batches_by_cost(lengths, self.batch_tokens):
                    embeddings = self._forward([window[row] for row in rows])
                    numbers = [begin + row for row in rows]
                    bad = ~np.isfinite(embeddings).all(axis=1)
                    if bad.any():
                        number = numbers[bad.argmax()]
                        name = documents[number].name or f"item {number}"
                        raise ValueError(f"{name}: the model's embedding of it is not finite")
                    result[numbers] = embeddings
                    bar.update(len(rows))
        return result

    def _document(self, item: Any, prompt: str, number: int) -> Document:
        document = Document.of(item, f"item {number}")
        if document.empty:
            raise ValueError(f"{document.name or f'item {number}'}: the document is empty")
        return prompted(document, prompt)

    @torch.no_grad()  # not inference_mode: masks of inference tensors are not kept on a GPU
    def _forward(self, encoded: list[Encoded]) -> np.ndarray:
        merge_size, image_token = self.encoder.merge_size, self.encoder.image_token_id
        batch = pack(encoded, merge_size, image_token).to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed):
            return self.model.embed(batch).float().cpu().numpy()


@dataclass(frozen=True)
class Hit:
    """A found document: cosine similarity, its name, and the beginning of its text; both printable,
    in one line."""

    score: float
    name: str
    text: str


def checkers(model: str | PathLike, max_length: int, *prompts: str) -> list[Check]:
    """For each prompt, what raises the ValueError that embedding a document with it would raise,
    but for the model's part.

    Needs none of the model's weights, so that sources are read before they are loaded.
    """
    tokenizer, image_settings, _ = read_directory(model)
    encoder = Encoder(tokenizer, image_settings, max_length)

    def check(prompt: str, document: Document) -> None:
        encoder.check(prompted(document, prompt))

    return [partial(check, prompt) for prompt in prompts]


def build_index(config: EmbedConfig) -> int:
    """Embed a source into the folder `config.output`; returns how many documents it holds.

    The folder holds embeddings.parquet (name, text, images, embedding) and index.json (the model).

    Raises:
        ConfigError: the folder exists, cannot be made or is being made by another process, or the
            source holds no documents.
    """
    output = Path(config.output)
    with new_output(output, "folder"):
        [check] = checkers(config.model, config.max_length, config.document_prompt)
        documents = list(load_documents(
            config.source,
            image_root=config.image_root or None,
            on_error=config.on_error,
            check=check,
        ))  # fmt: skip
        if not documents:
            raise ConfigError(f"source: {config.source} holds no documents")
        if config.on_error == "raise":  # to skip, loading has checked already
            for document in tqdm(documents, "checking", unit="doc"):
                check(document)
        embedder = Embedder.from_pretrained(
            config.model,
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
            precision=config.precision,
        )
        digest = model_digest(config.model)
        embeddings = embedder.encode(documents, prompt=config.document_prompt, progress=True)
        about = {"model": str(Path(config.model).resolve()) if Path(config.model).exists()
                 else config.model, "model_digest": digest, "source": config.source,
                 "documents": len(documents), "dimension": embedder.dimension,
                 "max_length": config.max_length, "precision": config.precision,
                 "document_prompt": config.document_prompt, "query_prompt": config.query_prompt,
                 **embedder.counts}  # fmt: skip
        with replacing(output) as folder:
            pq.write_table(_table(documents, embeddings), folder / EMBEDDINGS)
            (folder / INDEX).write_text(json.dumps(about, indent=1), encoding="utf-8")
    for reason, count in embedder.counts.items():
        tqdm.write(f"{count} {reason} at max_length {config.max_length}")
    return len(documents)


def _table(documents: list[Document], embeddings: np.ndarray) -> pa.Table:
    return pa.table({
        "name": [printable(document.name) for document in documents],
        "text": [document.text for document in documents],
        "images": pa.array([_image_names(document) for document in documents],
                           pa.list_(pa.string())),
        "embedding": pa.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1]),
    })  # fmt: skip


def search(
    folder: str | PathLike, query: Any, k: int = 5, model: str | PathLike | None = None
) -> list[Hit]:
    """The `k` documents of an index nearest to a query, best first.

    The query has the `query_prompt` that the index was made with around it.
    Says on stderr if the query was cut to the max_length of the index.

    Args:
        folder: written by `build_index`.
        query: text, or any other item that `Embedder.encode` takes, such as the path of an image.
        k: the number of hits.
        model: where the model of the index lies now, if it has been moved.

    Raises:
        ConfigError: the folder is no index written by `moca embed`, the query is empty, or k is
            below 1.
        ValueError: a damaged index, one of an earlier version (which did not note all that makes
            the embeddings of its model), or one made with another model than its folder holds now.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file() or not (folder / EMBEDDINGS).is_file():
        raise ConfigError(
            f"{folder} is no index: expected {EMBEDDINGS} and {INDEX} in it; make one with "
            f"`moca embed model=MODEL source=DOCUMENTS output={folder}`"
        )
    asked = Document.of(query, "query")
    if asked.empty:
        raise ConfigError(f"query: expected what to look for, got {query!r}")
    if k < 1:
        raise ConfigError(f"k: expected at least 1, got {k}")
    about = _read_about(folder / INDEX)
    table = _read_table(folder / EMBEDDINGS, about)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if model is None:
        model = about["model"]
        if Path(model).is_absolute() and not Path(model).exists():
            raise FileNotFoundError(
                f"{folder}: the model it was made with, {model}, is gone; if it has been moved, "
                "say where to (--model)"
            )
    embedder = Embedder.from_pretrained(
        model, max_length=about["max_length"], precision=about["precision"]
    )
    if model_digest(model) != about["model_digest"]:
        raise ValueError(
            f"{folder}: made with another model than the one that lies in {model} now: weights, "
            "tokenizer or settings differ; embed the documents again"
        )
    [embedding] = embedder.encode([asked], prompt=about["query_prompt"])
    scores = vectors.reshape(-1, about["dimension"]) @ embedding
    if any(embedder.counts.values()):
        tqdm.write(
            f"the query was cut to the {about['max_length']} tokens (max_length) of the index",
            file=sys.stderr,
        )
    best = np.argsort(-scores, kind="stable")[:k]
    names, texts = table["name"].to_pylist(), table["text"].to_pylist()
    return [Hit(float(scores[i]), printable(names[i]), _snippet(texts[i])) for i in best]


def _read_about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged, no JSON ({error}); embed again") from None
    found = about if isinstance(about, dict) else {}
    wrong = [f"{key} ({kind.__name__})" for key, kind in ABOUT.items()
             if type(found.get(key)) is not kind]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{file}: expected {', '.join(wrong)}; damaged or of an earlier version: embed the "
            "documents again"
        )
    return found


def _read_table(file: Path, about: dict[str, Any]) -> pa.Table:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: damaged, no Parquet ({error}); embed again") from None
    want = {"name": "string", "text": "string", "embedding": f"{about['dimension']} x float"}
    kinds = {field.name: _kind(field.type) for field in table.schema}
    found = {name: kinds[name] for name in want if name in kinds and not table[name].null_count}
    if found != want or len(table) != about["documents"]:
        raise ValueError(
            f"{file}: expected {about['documents']} rows of {want}, got {len(table)} of {found}; "
            "damaged: embed the documents again"
        )
    return table


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.list_size} x {kind.value_type}"
    return str(kind)


def _image_names(document: Document) -> list[str]:
    return [
        printable(str(image)) if isinstance(image, (str, PathLike)) else "(inline)"
        for image in document.images
    ]


def _snippet(text: str, length: int = 160) -> str:
    line = printable(" ".join(text.replace(IMAGE_MARKER, "[image]").split()))
    return line if len(line) <= length else line[: length - 1] + "…"
