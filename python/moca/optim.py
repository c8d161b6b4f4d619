"""Optimisers and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from moca.config import RunConfig


def build_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all parameters; or Muon over the hidden matrices and AdamW over the rest.

    Muon (Jordan 2024) orthogonalises the momentum of a matrix. Its step is scaled to the RMS of
    an AdamW step (Moonlight, arXiv 2502.16982), so both can share one rate. Embeddings, the
    LM head, the patch embedding, norms and biases stay with AdamW; norms and biases do not decay.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = []
    if config.optimizer == "muon":
        outer = _outer_parameters(model)
        matrices = [p for _, p in trained if p.dim() == 2 and id(p) not in outer]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = config.betas
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2)))
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=learning_rates(config)["muon_lr"],
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def learning_rates(config: RunConfig) -> dict[str, float]:
    """The largest rates: "lr" of AdamW and, where it trains, "muon_lr" of Muon."""
    rates = {"lr": config.lr}
    if config.optimizer == "muon":
        rates["muon_lr"] = config.muon_lr or config.lr
    return rates


def _outer_parameters(model: nn.Module) -> set[int]:
    """Parameters that map to or from tokens and pixels: not hidden matrices."""
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lm_head", "patch_head", "patch_embed", "pos_embed")):
            outer.add(id(parameter))
    return outer


def learning_rate_scale(step: int, config: RunConfig) -> float:
    """Factor on the learning rate at a step counted from 0: warm-up, then decay towards 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (config.steps - step) / max(1, config.steps - warmup + 1)
    if config.schedule == "linear":
        return left
    if config.schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * left))
    return 1.0


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Set every group to its first learning rate times `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("initial_lr", group["lr"])
