"""One typed dataclass a run: read from YAML, overridden by `key=value`, checked before anything
heavy loads, and saved beside the run."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from moca.data.prompts import check_prompt

OnError = Literal["raise", "skip"]
# Of products; trained weights are float32. auto: bf16 where the hardware multiplies it, else fp32.
Precision = Literal["auto", "fp32", "bf16"]

SEEDS = 2**63  # those of torch are 64-bit integers with a sign
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class ConfigError(ValueError):
    """A run's configuration cannot be used as it is; the message says which key and why."""


@dataclass
class RunConfig:
    """What both training stages share.

    Lengths and budgets are in tokens, rates are per optimiser step.
    """

    model: str  # a saved model directory, or the name of a Qwen-VL checkpoint on the hub
    output: str  # the run directory; refused if it exists, unless resume is set
    steps: int = 1000
    resume: bool = False  # go on from the newest checkpoint in `output`
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: AdamW where it does not apply
    lr: float = 2e-5
    muon_lr: float = 0.0  # of the matrices that muon trains; 0: the same as lr
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    warmup: float = 0.05  # fraction of the steps
    grad_clip: float = 5.0  # largest gradient norm; 0 leaves gradients as they are
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    max_length: int = 1280  # tokens: stage 1 cuts what is longer in parts, stage 2 drops the rest
    # least and most merged tokens of a resized image, e.g. [256, 1024]; default: the model's
    image_tokens: list[int] = field(default_factory=list)
    on_error: OnError = "raise"  # unreadable record: raise | skip (counted and reported)
    image_root: str = ""  # folder of the relative image paths in records; empty: of their file
    flip: float = 0.0  # probability that an image is mirrored left to right
    rotate: float = 0.0  # largest rotation of an image, degrees
    shift: float = 0.0  # largest move of an image, as a fraction of its sides
    zoom: float = 0.0  # largest change of an image's scale, as a fraction
    cache_images: bool = False  # keep resized images in memory
    workers: int = 0  # processes that prepare batches
    log_every: int = 10  # steps
    save_every: int = 500  # steps
    keep_checkpoints: int = 2

    def check(self) -> None:
        for name in ("steps", "max_length", "log_every", "save_every", "keep_checkpoints"):
            _at_least(self, name, 1)
        _seed(self)
        for name in ("workers", "grad_clip", "weight_decay", "rotate", "muon_lr"):
            _at_least(self, name, 0)
        for name in ("warmup", "flip", "shift"):
            _fraction(self, name)
        _folder(self, "image_root")
        if not 0 <= self.zoom < 1:
            raise ConfigError(f"zoom: expected a number in [0, 1), got {self.zoom}")
        if self.muon_lr and self.optimizer != "muon":
            raise ConfigError(f"muon_lr: needs optimizer=muon, got {self.optimizer}")
        _positive(self, "lr")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.image_tokens:
            _image_tokens(self)


@dataclass
class CptConfig(RunConfig):
    """Stage 1, modality-aware continual pre-training (MoCa section 3.1)."""

    # JSONL, JSON, Parquet, HTML folders, hub names (owner/name:subset@split, split train if none is
    # given); one alone needs no brackets
    documents: list[str] = field(default_factory=list)
    mlm_probability: float = 0.4  # of a text token to be masked
    mae_probability: float = 0.5  # of a merged image token to be masked
    mae_weight: float = 0.1  # w in L_MLM + w * L_MAE
    normalize_patches: bool = False  # MAE targets at zero mean and unit variance
    batch_cost: int = 12800  # cost of a micro-batch: one image token counts as four text tokens
    accumulation: int = 1  # micro-batches a step
    lr: float = 2e-6
    warmup: float = 0.1

    def check(self) -> None:
        super().check()
        for name in ("mlm_probability", "mae_probability"):
            _fraction(self, name)
        _at_least(self, "mae_weight", 0)
        _at_least(self, "batch_cost", 1)
        _at_least(self, "accumulation", 1)
        if not self.documents:
            raise ConfigError("documents: expected at least one source of documents, got none")


@dataclass
class ContrastConfig(RunConfig):
    """Stage 2, heterogeneous contrastive fine-tuning (MoCa section 3.2)."""

    # task name: source of its pairs; a folder of HTML has title-section and caption-figure alone, a
    # hub name (owner/name:subset@split) gives its split, or train is read
    pairs: dict[str, str] = field(default_factory=dict)
    batch_size: int = 24  # pairs a process and step
    task_batch_sizes: dict[str, int] = field(default_factory=dict)  # where a task's differs
    task_weights: dict[str, float] = field(default_factory=dict)  # share of steps; none: by size
    hard_negatives: int = 2  # of a query, at most; scored only against it
    temperature: float = 0.03  # to begin with, whatever the model was trained with before
    learn_temperature: bool = False
    token_dropout: float = 0.0  # probability that a text token is left out
    task_token_dropout: dict[str, float] = field(default_factory=dict)  # where a task's differs
    symmetric: bool = False  # also document -> query; MoCa trains query -> document only

    def check(self) -> None:
        super().check()
        _at_least(self, "batch_size", 1)
        _at_least(self, "hard_negatives", 0)
        _positive(self, "temperature")
        _fraction(self, "token_dropout")
        if not self.pairs:
            raise ConfigError("pairs: expected {task: source} with at least one task, got none")
        for name in ("task_batch_sizes", "task_weights", "task_token_dropout"):
            for task, value in getattr(self, name).items():
                if task not in self.pairs:
                    raise ConfigError(f"{name}: no such task {task!r}{_nearest(task, self.pairs)}")
                if name == "task_token_dropout":
                    _is_fraction(f"{name}.{task}", value)
                elif value <= 0:
                    raise ConfigError(f"{name}.{task}: expected a positive number, got {value}")
        if self.task_weights and (without := self.pairs.keys() - self.task_weights.keys()):
            raise ConfigError(
                f"task_weights: expected one for every task, or none at all, got none for "
                f"{', '.join(sorted(without))}"
            )


@dataclass
class EmbedConfig:
    """Embed every document of a source into one Parquet file."""

    model: str
    source: str  # as one of the documents of stage 1
    output: str  # the index directory; refused if it exists
    # Wording around a document, and around what is searched for in the index. {} is the place of it
    # all, {image} and {text} are those of its parts; without any, the wording goes before.
    document_prompt: str = ""
    query_prompt: str = ""
    batch_tokens: int = 8192
    max_length: int = 1280
    precision: Precision = "auto"  # fp32 loads the weights in float32 too
    on_error: OnError = "raise"
    image_root: str = ""  # as in training

    def check(self) -> None:
        _embedding(self)


@dataclass
class EvalConfig:
    """Metrics of a saved model over held-out pairs, MMEB tasks and BEIR folders."""

    model: str
    # task name: source of its pairs, as in training; a hub name that gives no split has test read
    pairs: dict[str, str] = field(default_factory=dict)
    mmeb: dict[str, str] = field(default_factory=dict)  # task name: source of MMEB-eval rows
    beir: dict[str, str] = field(default_factory=dict)  # task name: corpus, queries and qrels
    output: str = ""  # a JSON file for the metrics; empty prints only
    # Wording around every query and every candidate, as for embedding; what MMEB rows say stays.
    query_prompt: str = ""
    document_prompt: str = ""
    batch_tokens: int = 8192
    max_length: int = 1280
    precision: Precision = "auto"  # fp32 loads the weights in float32 too
    on_error: OnError = "raise"
    image_root: str = ""  # as in training

    def check(self) -> None:
        _embedding(self)
        tasks = [*self.pairs, *self.mmeb, *self.beir]
        if not tasks:
            raise ConfigError("expected pairs, mmeb or beir: {task: source}, got no task")
        if len(set(tasks)) < len(tasks):
            raise ConfigError(f"a task name stands twice among pairs, mmeb and beir: {tasks}")


@dataclass
class QuickstartConfig:
    """The whole system on real data with a miniature model, trained from scratch."""

    output: str = "runs/quickstart"
    docs: str = ""  # a folder of HTML pages; empty fetches the Debian packages
    cache: str = ".cache/quickstart"  # where packages are kept between runs
    seed: int = 0
    scale: float = 1.0  # factor on all numbers of steps
    baseline: bool = True  # also train the CNN + n-gram baseline
    compare: bool = False  # also train the comparisons about stage 1; takes several times as long

    def check(self) -> None:
        _seed(self)
        _positive(self, "scale")


Config = TypeVar("Config")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which yaml would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, name in enumerate(names):
            if name in names[:number]:
                problem = f"key {name!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(
    cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read `cls` from a YAML file and `key=value` overrides, checked.

    Nested keys are written with dots (`pairs.gloss=gloss.jsonl`). A text is taken as it is, less
    one pair of quotes around it; so is a list of texts that does not begin with a bracket, which
    then holds this one. Other values are YAML.

    Raises:
        ConfigError: an unreadable file, an unknown key (with the nearest name), a missing key,
            a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{path}: expected `key: value` lines, got {type(loaded).__name__}")
        values.update(loaded)
    for override in overrides:
        _apply_override(values, override, typing.get_type_hints(cls))
    return from_dict(cls, values)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build and check a config of type `cls`; errors as in `load_config`."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {key!r}{_nearest(str(key), fields)}")
    for name, spec in fields.items():
        required = spec.default is MISSING and spec.default_factory is MISSING
        if required and name not in values:
            raise ConfigError(f"missing key {name!r}: expected {_type_name(hints[name])}")
    config = cls(**{key: _coerce(key, value, hints[key]) for key, value in values.items()})
    config.check()  # type: ignore[attr-defined]
    return config


def save_config(config: Any, path: str | Path) -> None:
    """Write the config as YAML that `load_config` reads back."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def _apply_override(values: dict[str, Any], override: str, hints: Mapping[str, Any]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"expected key=value, got {override!r}")
    target = values
    *parents, last = key.split(".")
    hint = hints.get(key.split(".")[0])
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{key}: {parent!r} holds a single value, not keys of its own")
        hint = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    target[last] = _read_value(key, text, hint)


def _read_value(key: str, text: str, hint: Any) -> Any:
    """The value of an override; YAML would cut a text at ` #`, and read 2024 as a number."""
    if text and (hint is str or (hint == list[str] and not text.lstrip().startswith("["))):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: cannot read {text!r} as YAML: {error}") from error


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, where nothing is lost by it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint == list[str] and isinstance(value, str):
        return [value]
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _coerce(key, value, inner)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{key}: expected one of {', '.join(arguments)}, got {value!r}")
    if origin is list and isinstance(value, list):
        return [_coerce(f"{key}[{i}]", item, arguments[0]) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _coerce(f"{key}.{k}", v, arguments[1]) for k, v in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
        else:
            if abs(number) <= FLOAT32_MAX:
                return number
            raise ConfigError(f"{key}: expected a finite number in float32, got {value!r}")
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise ConfigError(f"{key}: expected {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _at_least(config: Any, name: str, least: float) -> None:
    if not (value := getattr(config, name)) >= least:
        raise ConfigError(f"{name}: expected at least {least}, got {value}")


def _image_tokens(config: RunConfig) -> None:
    """Sides are rounded, so bounds need room; an image stands between two tokens of its own."""
    match config.image_tokens:
        case [least, most] if 2 <= 2 * least <= most <= config.max_length - 2:
            return
    raise ConfigError(
        "image_tokens: expected [least, most] with 1 <= least, 2 * least <= most and most <= "
        f"max_length - 2 = {config.max_length - 2}, got {config.image_tokens}"
    )


def _seed(config: Any) -> None:
    _at_least(config, "seed", 0)
    if config.seed >= SEEDS:
        raise ConfigError(f"seed: expected less than 2**63, got {config.seed}")


def _folder(config: Any, name: str) -> None:
    if (path := getattr(config, name)) and not Path(path).is_dir():
        raise ConfigError(f"{name}: expected a folder, got {path}")


def _embedding(config: Any) -> None:
    for name in ("batch_tokens", "max_length"):
        _at_least(config, name, 1)
    _folder(config, "image_root")
    for name in ("query_prompt", "document_prompt"):
        try:
            check_prompt(getattr(config, name))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None


def _positive(config: Any, name: str) -> None:
    if not (value := getattr(config, name)) > 0:
        raise ConfigError(f"{name}: expected more than 0, got {value}")


def _fraction(config: Any, name: str) -> None:
    _is_fraction(name, getattr(config, name))


def _is_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected 0 to 1, got {value}")
