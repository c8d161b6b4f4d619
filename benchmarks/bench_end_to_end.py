"""The whole system: a step of both training stages, and `encode`, in tokens a second.

The peer is the same model with torch's attention over padded rows and torch's losses; "sorted"
cuts a batch into chunks of similar length first. In `encode` both take chunks of as many tokens as
ours, padding counted: the first of documents as they come, "sorted" as sentence-transformers does.
The peer keeps our patch embedding, a matrix product that is faster on CPUs than the convolution
transformers has. Making batches is in no time but that of `encode`. The oracle takes every document
alone; transformers' norms and rotary angles stay in float32 even there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from moca.config import ContrastConfig, CptConfig
from moca.contrast import ContrastObjective, PairBatch
from moca.data.encode import Encoder
from moca.data.packing import document_cost, pack
from moca.embed import Embedder
from moca.model import MocaModel, resolve_precision, split_documents
from moca.pretrain import MaskedBatch, mask_batch
from moca.quickstart.run import BATCH, CPT_COST, IMAGES, TRAINING
from moca.run import seeded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import padded, steps
from benchmarks.harness import Cost, Expected, Runner, Target, Work
from benchmarks.miniatures import (
    DOCUMENTS,
    POSITIVES,
    QUERIES,
    QUICKSTART,
    TINY,
    WIDE,
    Size,
    build,
    documents,
    tokenizer,
)
from benchmarks.steps import Step, on_backend, training

# Configurations name files; nothing here reads or writes one.
PATHS: dict[str, Any] = {"model": "-", "output": "-"}
TEMPERATURE = 0.05
SORTED_CHUNKS = 4


@dataclass(frozen=True, kw_only=True)
class System(Work):
    """`kind` is "cpt", "contrast" or "encode"; `amount` its cost, its pairs or its documents."""

    kind: str
    model: Size
    amount: int

    @property
    def title(self) -> str:
        return f"{self.kind} {self.model.name}"

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        return ()

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(tokenizer(), IMAGES, TRAINING["max_length"])

    def masked_batch(self) -> MaskedBatch:
        """Documents in random order, up to the cost of a batch."""
        config, encoded, room = self.config(), [], self.amount
        for document in map(self.encoder, documents(self.amount, DOCUMENTS, seed=0)):
            room -= document_cost(len(document), len(document.patches) // IMAGES.merge_size**2)
            if room < 0:
                break
            encoded.append(document)
        return mask_batch(
            pack(encoded, IMAGES.merge_size, self.encoder.image_token_id),
            special_ids=torch.tensor(sorted(tokenizer().all_special_ids)),
            mask_token_id=tokenizer().mask_token_id,
            merge_size=IMAGES.merge_size,
            mlm_probability=config.mlm_probability,
            mae_probability=config.mae_probability,
            generator=seeded(0),
        )

    def pair_batch(self) -> PairBatch:
        pairs = documents(self.amount, QUERIES, 1) + documents(self.amount, POSITIVES, 2)
        encoded = [self.encoder(document) for document in pairs]
        batch = pack(encoded, IMAGES.merge_size, self.encoder.image_token_id)
        return PairBatch("mixed", batch, [0] * self.amount, self.encoder.counts)

    def config(self) -> Any:
        """That of the stage, with the quickstart's settings."""
        if self.kind == "cpt":
            return CptConfig(**PATHS, documents=["-"], **TRAINING)
        return ContrastConfig(**PATHS, pairs={"mixed": "-"}, temperature=TEMPERATURE, **TRAINING)

    def expected(self, device: str) -> list[Expected]:
        rough, exact = (partial(alone, self, device, t) for t in (self.torch_dtype, torch.float64))
        return steps.expected(rough, exact, self.torch_dtype)

    def cost(self) -> Cost:
        return _counted(self)


@lru_cache
def _counted(work: System) -> Cost:
    """Operations that torch counts while every document goes through alone, without padding."""
    step = alone(work, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        step.run()
    return Cost(counter.get_total_flops(), 0, step.info["tokens"])


def moca(work: System, leaves: tuple, d_out: Tensor, backend: str) -> Step:
    model = build(work.model, "moca_fast").to(d_out.device)
    step = {"cpt": _cpt, "contrast": _contrast, "encode": _encode}[work.kind](work, model)
    return on_backend(step, backend)


def _cpt(work: System, model: MocaModel) -> Step:
    return steps.cpt(work, model, work.masked_batch(), work.config())


def _contrast(work: System, model: MocaModel) -> Step:
    batch = work.pair_batch().to(model.device)
    objective = ContrastObjective(model, work.config()).to(model.device)

    def losses() -> Iterator[Tensor]:
        yield objective(batch)

    return training(work, model, objective, losses, len(batch.batch.input_ids), work.config())


def _encode(work: System, model: MocaModel) -> Step:
    precision = "bf16" if work.dtype == "bfloat16" else "fp32"
    embedder = Embedder(model.eval(), TRAINING["max_length"], precision=precision)
    items = documents(work.amount, POSITIVES, 0)
    tokens = sum(len(work.encoder(item)) for item in items)
    return Step(lambda: [torch.from_numpy(embedder.encode(items))], tokens)


def rows(work: System, leaves: tuple, d_out: Tensor, chunks: int) -> Step:
    """The peer: padded rows, in one chunk or in several of similar length."""
    return _padded(work, build(work.model, "sdpa").to(d_out.device), chunks)


def alone(work: System, device: str, dtype: torch.dtype) -> Step:
    """Every document in a chunk of its own, with nothing fused."""
    weights = torch.float64 if dtype == torch.float64 else torch.float32  # autocast does the rest
    return _padded(work, build(work.model, "eager").to(device=device, dtype=weights), None)


def _padded(work: System, model: MocaModel, chunks: int | None) -> Step:
    """`chunks` of None puts every document into its own."""
    return {"cpt": _cpt_rows, "contrast": _contrast_rows, "encode": _encode_rows}[work.kind](
        work, model, chunks
    )


def _cpt_rows(work: System, model: MocaModel, chunks: int | None) -> Step:
    return steps.cpt_rows(work, model, work.masked_batch(), work.config(), chunks)


def _contrast_rows(work: System, model: MocaModel, chunks: int | None) -> Step:
    """Queries and documents apart from each other, as their lengths differ."""
    batch = work.pair_batch()
    singles = split_documents(batch.batch, IMAGES)
    embed_sides = [
        padded.embedding(model, side, chunks or len(side))
        for side in (singles[: work.amount], singles[work.amount :])
    ]
    target = torch.arange(work.amount, device=model.device)

    def losses() -> Iterator[Tensor]:
        query, document = (embed() for embed in embed_sides)
        yield F.cross_entropy(query @ document.T / TEMPERATURE, target)

    return training(work, model, model, losses, len(batch.batch.input_ids), work.config())


def _encode_rows(work: System, model: MocaModel, chunks: int | None) -> Step:
    """`chunks`: 1 takes documents as they come, None each alone, more sort them by length."""
    items, model = documents(work.amount, POSITIVES, 0), model.eval()
    budget = 1 if chunks is None else Embedder(model).batch_tokens
    mixed = work.dtype == "bfloat16" and model.vlm.dtype == torch.float32

    @torch.inference_mode()
    def encode() -> list[Tensor]:
        encoded = [work.encoder(item) for item in items]
        order = list(range(len(encoded)))
        if chunks != 1:
            order.sort(key=lambda i: -len(encoded[i]))
        cuts, longest = [0], 0
        for place, item in enumerate(order):
            longest = max(longest, len(encoded[item]))
            if place > cuts[-1] and longest * (place - cuts[-1] + 1) > budget:
                cuts.append(place)
                longest = len(encoded[item])
        result = torch.empty(len(items), model.hidden_size, dtype=model.vlm.dtype)
        for begin, end in pairwise([*cuts, len(order)]):
            some = order[begin:end]
            image = work.encoder.image_token_id
            singles = [pack([encoded[i]], IMAGES.merge_size, image) for i in some]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
                result[some] = padded.embed(model, padded.pad(singles).to(model.device)).cpu()
        return [result]

    return Step(encode, sum(len(work.encoder(item)) for item in items))


def _full() -> list[System]:
    mixed = {"fp32": "float32", "bf16": "bfloat16"}[resolve_precision("auto")]
    works = []
    # The amounts of a step of the quickstart; an eighth for the larger model, whose tokens are 20
    # times as much work.
    for model, targets, cost, pairs, items in (
        (QUICKSTART, (Target(2),), CPT_COST, BATCH, 512),
        (WIDE, (), CPT_COST // 8, BATCH // 8, 64),
    ):
        for kind, amount in (("cpt", cost), ("contrast", pairs), ("encode", items)):
            works.append(
                System(
                    kind=kind,
                    model=model,
                    amount=amount,
                    dtype=mixed,
                    backward=kind != "encode",
                    targets=targets,
                )
            )
    return works


PEERS = [
    Runner("torch", partial(rows, chunks=1), yardstick=True),
    Runner("torch sorted", partial(rows, chunks=SORTED_CHUNKS)),
]
WORKS = {
    "tiny": [
        System(kind="cpt", model=TINY, amount=400),
        System(kind="contrast", model=TINY, amount=6),
        System(kind="encode", model=TINY, amount=6, backward=False),
    ],
    "full": _full(),
}


def bench_end_to_end(measured, work, runner):
    measured(work, runner)
