"""The saved model directory: one that transformers and sentence-transformers load with plain code.

Beside the weights, config and tokenizer stand the image settings, a chat template that only
concatenates, the modules of sentence-transformers (mean pooling, normalisation) and `moca.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.utils import cached_file

from moca.checkpoint import replacing
from moca.data.images import ImageSettings
from moca.data.records import IMAGE_MARKER

MASK_TOKEN = "<|mask|>"
END_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (
    END_TOKEN,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    MASK_TOKEN,
)
SETTINGS = "moca.json"
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
# What sentence-transformers 6.2 writes for such a model; videos are left out.
SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.{kind}"}
        for idx, (path, kind) in enumerate(
            (
                ("", "base.modules.transformer.Transformer"),
                ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
                ("2_Normalize", "base.modules.normalize.Normalize"),
            )
        )
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": _FORWARD,
            "image": _FORWARD,
            "message": {**_FORWARD, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
    "2_Normalize/config.json": {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    },
}
# "name" or "owner/name"; what begins with a point is a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# Files of a saved model that another model or another release of transformers writes.
_FORMER = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|generation_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
)
# Contents one after another: what the model was trained on, where chat models put roles between.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_MARKER + "{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Settings:
    """What `moca.json` holds.

    Args:
        bidirectional: whether every token sees its whole document.
        pooling: "mean" or "last".
        temperature: that contrastive training ended with, as a record: embeddings do not depend on
            it, and further training begins with its own. None before any.

    Raises:
        ValueError: a value of another type, or an unknown pooling.
    """

    bidirectional: bool = True
    pooling: str = "mean"
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bidirectional, bool):
            raise ValueError(f"bidirectional: expected true or false, got {self.bidirectional!r}")
        if type(self.temperature) not in (float, int, type(None)):
            raise ValueError(f"temperature: expected a number or null, got {self.temperature!r}")
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"pooling: expected 'mean' or 'last', got {self.pooling!r}")


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of the Qwen kind on a small corpus.

    Words are split as Qwen's tokenizer splits them, but a word is the same tokens in capitals, in
    small letters, and wherever it stands in a line: a small corpus says too little of each form.
    So decoding gives small letters, and one space for any white space.

    Args:
        texts: the corpus; special tokens in it are left out.
        vocab_size: most tokens, the special ones included.

    Returns:
        A tokenizer with the special tokens of Qwen-VL and `<|mask|>`.

    Raises:
        ValueError: no room for the 256 bytes and the special tokens.
    """
    size = vocab_size - len(SPECIAL_TOKENS)
    if size < 256:
        raise ValueError(
            f"vocab_size: expected at least {256 + len(SPECIAL_TOKENS)}, got {vocab_size}"
        )
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(map(_without_specials, texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in (END_TOKEN, MASK_TOKEN)],
        chat_template=CHAT_TEMPLATE,
    )


def _without_specials(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text


def add_mask_token(vlm: PreTrainedModel, tokenizer: Any) -> None:
    """Give the tokenizer a mask token and the model a row for it: the mean of the other rows.

    Does nothing if there is a mask token. Embeddings grow only when no spare row is left.
    """
    if tokenizer.mask_token is not None:
        return
    used = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    embedding: Any = vlm.get_input_embeddings()
    if len(tokenizer) > embedding.weight.shape[0]:
        vlm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {id(table.weight): table.weight for table in _tables(vlm)}
    with torch.no_grad():
        for weight in tables.values():
            mean = weight[:used].mean(dim=0, dtype=torch.float32)
            weight[tokenizer.mask_token_id] = mean.to(weight.dtype)


def _tables(vlm: PreTrainedModel) -> list[Any]:
    return [t for t in (vlm.get_input_embeddings(), vlm.get_output_embeddings()) if t is not None]


def read_directory(directory: str | os.PathLike) -> tuple[Any, ImageSettings, Settings]:
    """The tokenizer, image settings and settings of a directory or hub repository.

    Raises:
        OSError, ValueError: a directory that is missing, incomplete or of another kind.
    """
    path = Path(directory)
    if not path.exists() and not _HUB_NAME.fullmatch(os.fspath(directory)):
        raise FileNotFoundError(f"{os.fspath(directory)}: there is no such folder")
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected a model directory, but it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    config = _read_json(directory, PREPROCESSOR)
    if config is None:
        processor = _read_json(directory, PROCESSOR) or {}
        config = processor.get("image_processor")
    if config is None:
        raise FileNotFoundError(f"{os.fspath(directory)}: expected {PREPROCESSOR} or {PROCESSOR}")
    return tokenizer, ImageSettings.from_processor_config(config), _read_settings(directory)


def _read_settings(directory: str | os.PathLike) -> Settings:
    values = _read_json(directory, SETTINGS)
    if values is None:
        return Settings()
    where = f"{os.fspath(directory)}/{SETTINGS}"
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected names and values, got {type(values).__name__}")
    if unknown := values.keys() - asdict(Settings()).keys():
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
    try:
        return Settings(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_json(directory: str | os.PathLike, name: str) -> Any:
    path = cached_file(
        directory,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def model_digest(directory: str | os.PathLike) -> str:
    """SHA-256 over what makes the embeddings of a directory, or of a hub repository once loaded:
    weights, config, tokenizer, image settings, and what `moca.json` says of attention and pooling.

    Raises:
        FileNotFoundError: it holds no weights.
    """
    # Beside the config, also in the hub's cache.
    folder = Path(str(cached_file(directory, "config.json"))).parent
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected model.safetensors or shards of it")
    for names in (["config.json"], ["tokenizer.json", "vocab.json"], [PREPROCESSOR, PROCESSOR]):
        files += [folder / name for name in names if (folder / name).is_file()][:1]
    settings = _read_settings(directory)
    digest = hashlib.sha256(f"{settings.bidirectional} {settings.pooling}".encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_directory(
    directory: Path,
    vlm: PreTrainedModel,
    tokenizer: Any,
    image_settings: ImageSettings,
    settings: Settings,
) -> None:
    """Write the directory beside its place and rename it into place once it is complete.

    Raises:
        FileExistsError: in its place stands something else than an earlier saved model.
    """
    # A link stays; what it leads to is replaced.
    directory = directory.resolve()
    with replacing(directory) as folder:
        vlm.save_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        _write_json(folder / PREPROCESSOR, image_settings.to_processor_config())
        _write_json(folder / SETTINGS, asdict(settings))
        for name, value in SENTENCE_TRANSFORMERS.items():
            _write_json(folder / name, value)
        pooling = {
            "embedding_dimension": vlm.config.get_text_config().hidden_size,
            "pooling_mode": {"mean": "mean", "last": "lasttoken"}[settings.pooling],
            "include_prompt": True,
        }
        _write_json(folder / "1_Pooling" / "config.json", pooling)
        _check_replaceable(directory, folder)


def _check_replaceable(old: Path, new: Path) -> None:
    """Refuse to replace what saving does not write: it would be lost."""
    if not old.exists():
        return
    if not old.is_dir():
        raise FileExistsError(f"{old}: expected a folder for the model, got a file")
    entries = {path.relative_to(old).as_posix() for path in old.rglob("*")}
    if SETTINGS in entries:
        entries -= {path.relative_to(new).as_posix() for path in new.rglob("*")}
        entries = {name for name in entries if not _FORMER.fullmatch(name)}
    if entries:
        raise FileExistsError(
            f"{old} holds {min(entries)}, which is no part of a model saved here and would be "
            "lost; save the model into another folder"
        )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
