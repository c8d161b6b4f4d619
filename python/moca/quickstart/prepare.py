"""The quickstart's corpora as files in the published schemas: what any other run would read.

`documents/*.parquet` for stage 1, `train/<task>.jsonl` and `test/<task>.jsonl` for stage 2 and for
evaluation, and the pictures they name, resized once.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moca.checkpoint import replacing
from moca.data.batching import pair_keys
from moca.data.images import ImageSettings, decode, resize
from moca.data.records import Document, ImageLike, Pair
from moca.quickstart.corpora import Corpora


class PictureStore:
    """Pictures resized to the model's budget, each content once.

    Args:
        settings: patch size and pixel budget.
        folder: the data folder; pictures go to `folder/images`.
    """

    def __init__(self, settings: ImageSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        (folder / "images").mkdir()
        self._known: dict[object, tuple[str, bytes]] = {}

    def __call__(self, image: ImageLike, name: str) -> tuple[str, bytes]:
        """The picture's path relative to the data folder, and its PNG bytes."""
        key = image if isinstance(image, (bytes, str, Path)) else id(image)
        if key not in self._known:
            buffer = io.BytesIO()
            resize(decode(image, name), self.settings, name).save(buffer, "PNG")
            png = buffer.getvalue()
            path = f"images/{hashlib.blake2b(png, digest_size=10).hexdigest()}.png"
            (self.folder / path).write_bytes(png)
            self._known[key] = (path, png)
        return self._known[key]


def write_corpora(
    corpora: Corpora,
    folder: Path,
    settings: ImageSettings,
    progress: Callable[[Iterable, str], Iterable],
) -> None:
    """Write `corpora` to `folder`, which is there whole or not at all."""
    with replacing(folder) as data:
        store = PictureStore(settings, data)
        (data / "documents").mkdir()
        for source, documents in corpora.documents.items():
            rows = [
                {
                    "name": document.name,
                    "text": document.text,
                    "images": [store(image, document.name)[1] for image in document.images],
                }
                for document in progress(documents, f"writing {source} documents")
            ]
            images = pa.list_(pa.binary())
            schema = pa.schema([("name", pa.string()), ("text", pa.string()), ("images", images)])
            table = pa.Table.from_pylist(rows, schema)
            pq.write_table(table, data / "documents" / f"{source}.parquet")
        train = {task.name: task.train for task in corpora.tasks}
        test = {task.name: task.test for task in corpora.tasks}
        for part, tasks in (("train", train), ("test", test)):
            (data / part).mkdir()
            for task, pairs in tasks.items():
                lines = [
                    json.dumps(_record(pair, store), ensure_ascii=False) + "\n"
                    for pair in progress(pairs, f"writing {part} {task}")
                ]
                (data / part / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        summary = {
            "tasks": corpora.summary(),
            "documents": {source: len(group) for source, group in corpora.documents.items()},
            "distinct": {task: distinct(pairs) for task, pairs in train.items()},
            "notes": corpora.notes,
        }
        (data / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def distinct(pairs: Sequence[Pair]) -> int:
    """How many pairs can stand in one batch at most: none may share a query or a positive."""
    queries, positives = ({pair_keys(pair)[side] for pair in pairs} for side in (0, 1))
    return min(len(queries), len(positives))


def _record(pair: Pair, store: PictureStore) -> dict:
    def paths(document: Document) -> list[str]:
        return [f"../{store(image, pair.name)[0]}" for image in document.images]

    return {
        "qry": pair.query.text,
        "qry_image_path": paths(pair.query),
        "pos_text": pair.positive.text,
        "pos_image_path": paths(pair.positive),
        "neg_text": [negative.text for negative in pair.negatives],
        "neg_image_path": [paths(negative) for negative in pair.negatives],
    }
