"""A training step as one piece of work: ours over packed documents, and over padded rows as the
peer and, one document at a time, as the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from moca.config import CptConfig, RunConfig
from moca.model import MocaModel
from moca.optim import build_optimizers
from moca.pretrain import IGNORE, MaskedBatch, PretrainObjective
from torch import Tensor, nn

import moca_fast
from benchmarks import padded
from benchmarks.clock import release
from benchmarks.harness import Call, Expected, Work, largest_difference
from moca_fast import _dispatch

# A single number may agree with the oracle by chance: so many roundings are allowed in any case.
LEAST_ROUNDINGS = 2
PROFILED = 12  # operations listed by the time they take


class Step(Call):
    """A training step or an encoding: everything is inside, there is nothing to differentiate."""

    def __init__(self, work: Callable[[], Sequence[Tensor]], tokens: int) -> None:
        super().__init__(lambda: torch.empty(0), (), torch.empty(0), info={"tokens": tokens})
        self.work = work

    def prepared(self, work: Work) -> Step:
        return self

    def run(self) -> tuple[Tensor, ...]:
        return tuple(self.work())

    def report(self) -> dict[str, Any]:
        """Where the time goes: the operations with the most, as fractions of all."""
        activities, clock = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            clock = "self_device_time_total"
        with torch.profiler.profile(activities=activities) as profile:
            self.run()
        events = sorted(profile.key_averages(), key=lambda e: -getattr(e, clock))
        total = sum(getattr(event, clock) for event in events) or 1
        shares = [(e.key, getattr(e, clock) / total, e.count) for e in events[:PROFILED]]
        return {**self.info, "profile": shares}


def on_backend(step: Step, backend: str) -> Step:
    """The step with a backend tried first for every op, then the others, proven on this GPU or not:
    no backend has a kernel for every call."""
    inner = step.work
    order = (backend, *(name for name in _dispatch.BACKENDS if name != backend))

    def work() -> Sequence[Tensor]:
        with (
            patch.object(_dispatch, "BACKENDS", order),
            patch.object(_dispatch, "_unproven", lambda *_: None),
            moca_fast.use_backend("auto"),
        ):
            return inner()

    step.work = work
    return step


def training(
    work: Work,
    model: MocaModel,
    objective: nn.Module,
    losses: Callable[[], Iterator[Tensor]],
    tokens: int,
    config: RunConfig,
) -> Step:
    """A step of either stage: (loss, norm of the gradient, gradient of an early bias).

    Args:
        losses: parts of the loss; each is differentiated before the next is made.
    """
    objective.train()
    device = model.device.type
    optimizers = build_optimizers(objective, config)
    mixed = work.dtype == "bfloat16" and model.vlm.dtype == torch.float32
    early = model.language_model.layers[0].self_attn.q_proj.bias

    def step() -> tuple[Tensor, ...]:
        total, parts = 0.0, losses()
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                part = next(parts, None)
            if part is None:
                break
            part.backward()
            total += float(part.detach())
        gradient = early.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return torch.tensor(total, dtype=torch.float64), norm.detach().cpu(), gradient

    return Step(step, tokens)


def cpt(work: Work, model: MocaModel, masked: MaskedBatch, config: CptConfig) -> Step:
    """Stage 1 over packed documents."""
    masked = masked.to(model.device)
    objective = pretraining(model)

    def losses() -> Iterator[Tensor]:
        mlm, mae = objective(masked)
        yield mlm + config.mae_weight * mae

    return training(work, model, objective, losses, len(masked.labels), config)


def cpt_rows(
    work: Work, model: MocaModel, masked: MaskedBatch, config: CptConfig, chunks: int | None
) -> Step:
    """Stage 1 over padded rows, in `chunks` parts; None puts every document into its own."""
    parts = padded.pad_masked(masked, model, chunks or len(masked.batch))
    tokens = int((masked.labels != IGNORE).sum())
    patches = len(masked.units) * model.image_settings.merge_size**2
    objective = pretraining(model)

    def losses() -> Iterator[Tensor]:
        for part in parts:
            mlm, mae = padded.pretrain_loss(objective, part, tokens, patches)
            yield mlm + config.mae_weight * mae

    return training(work, model, objective, losses, len(masked.labels), config)


def pretraining(model: MocaModel) -> PretrainObjective:
    """With the same weights every time, in the dtype of the model."""
    torch.manual_seed(0)
    return PretrainObjective(model).to(device=model.device, dtype=model.vlm.dtype)


def expected(
    rough: Callable[[], Step], exact: Callable[[], Step], dtype: torch.dtype
) -> list[Expected]:
    """The results of a step in high precision, and how far plain torch in `dtype` is from them.

    Args:
        rough, exact: make the steps; one is given up before the next is made.
    """
    least, results = LEAST_ROUNDINGS * torch.finfo(dtype).eps, []
    for make in (rough, exact):
        results.append(make().run())
        release()
    return [
        Expected(e, max(largest_difference(r, e), least * float(e.abs().max())))
        for r, e in zip(*results, strict=True)
    ]
