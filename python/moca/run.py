"""A training run: its folder, its log, its checkpoints, and how it stops early."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from moca.checkpoint import (
    CheckpointError,
    check_place,
    is_leftover,
    latest_checkpoint,
    load_checkpoint,
    naming,
    save_checkpoint,
    take_lock,
    tidy,
    write_file,
)
from moca.config import ConfigError, RunConfig, save_config
from moca.model import MocaModel
from moca.optim import (
    build_optimizers,
    learning_rate_scale,
    learning_rates,
    set_learning_rate,
)
from moca.processes import make_accelerator, peak_memory, stop_signal

CONFIG, LOG, LOCK = "config.yaml", "log.jsonl", ".lock"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; a checkpoint to resume from has been written."""


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number; the weights were left as they were."""


def begin(config: RunConfig) -> tuple[Path | None, Accelerator, MocaModel]:
    """What both stages begin with: the checkpoint to go on from, the processes, and the model.

    Its weights are float32 whatever the checkpoint's are: a step at a usual rate is less than half
    of what tells one bfloat16 number from the next, so that most weights would never change.
    """
    checkpoint = check_output(config)
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    model = MocaModel.from_pretrained(config.model, dtype=torch.float32)
    if config.image_tokens:  # saved with the model, so that embedding and evaluation go by it too
        area = model.image_settings.factor**2
        least, most = (count * area for count in config.image_tokens)
        settings = dataclasses.replace(model.image_settings, min_pixels=least, max_pixels=most)
        model.image_settings = settings
    if config.gradient_checkpointing:
        if hasattr(model.vlm, "activation_checkpointing_enable"):  # since transformers 5.23
            model.vlm.activation_checkpointing_enable()
        else:
            model.vlm.gradient_checkpointing_enable()
    return checkpoint, accelerator, model


def check_output(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, or None to begin.

    Raises:
        ConfigError: the folder exists and `resume` is not set, it cannot be written to, or there is
            nothing to resume.
    """
    folder = Path(config.output)
    try:
        check_place(folder / CONFIG)
    except OSError as error:
        raise ConfigError(f"output: {error}") from None
    if not config.resume:
        if folder.exists() and not _is_untouched(folder):
            raise ConfigError(
                f"output: {folder} exists; give another folder, or resume=true to go on from its "
                "newest checkpoint"
            )
        return None
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None and not (folder / CONFIG).exists():
        raise ConfigError(f"resume: no checkpoint found in {folder}")
    return checkpoint


def _is_untouched(folder: Path) -> bool:
    """Whether no run has begun in a folder, but for what one left that was killed at once."""
    return folder.is_dir() and all(
        path.name == LOCK or is_leftover(path) for path in folder.iterdir()
    )


class Run:
    """The state of one run that outlives a crash.

    Args:
        config: saved as config.yaml in the run folder.
        accelerator: only its main process writes.
        objective: what is trained; a checkpoint holds it and its optimizers.
        checkpoint: of an earlier start of the same run, or None.
        batches: of a number of steps, what tells their batches from those of another seed, number
            of records, size or number of processes; anything that JSON holds. Other records in the
            same number are not noticed.

    Attributes:
        trained: the objective, to be called for its loss; it gathers gradients over processes.
        counts: of what happened to records in this process; the main one also holds what all
            counted before a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, of other modules or of an earlier version.
        ConfigError: it is past `steps`, its steps were made of other batches or of images of other
            sizes, or another process writes to the folder.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        checkpoint: Path | None,
        batches: Callable[[int], Any],
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.modules, self.batches = {"objective": objective}, batches
        optimizers = build_optimizers(objective, config)
        self.trained, *self.optimizers = accelerator.prepare(objective, *optimizers)
        self.trained.train()
        self.folder = Path(config.output)
        self.step, self.seconds = 0, 0.0
        self.counts: Counter[str] = Counter()
        self._values: dict[str, list[float]] = {}
        self._shown: dict[str, str] = {}
        self._lock = self._take_folder() if accelerator.is_main_process else None
        if checkpoint is not None:
            self._load(checkpoint)
        self._since = self._began = time.monotonic()
        if accelerator.is_main_process:
            tidy(self.folder)
            for change in self._changes():  # they count for the steps that follow
                tqdm.write(f"resume: {change}")
            write_file(self.folder / CONFIG, lambda path: save_config(config, path))
            self._trim_log()
        accelerator.wait_for_everyone()

    def _take_folder(self) -> IO:
        """Make the folder, and keep other processes from writing to it while the lock is held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.folder / LOCK, self.folder)
        if not self.config.resume and not _is_untouched(self.folder):
            raise ConfigError(f"output: another process has written to {self.folder} since")
        return lock

    def _load(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, modules=self.modules, optimizers=self.optimizers)
        kept = {"step", "seconds", "values", "counts", "batches", "image_tokens"}
        if missing := kept - state.keys():
            raise CheckpointError(
                f"{checkpoint}: state.json lacks {sorted(missing)}; it is of an earlier version, "
                "which this one cannot go on from: begin again in another folder"
            )
        self.step, self.seconds, self._values = state["step"], state["seconds"], state["values"]
        if self.config.steps < self.step:
            raise ConfigError(
                f"steps: expected at least {self.step}, which {checkpoint} has reached, got "
                f"{self.config.steps}"
            )
        if self.config.image_tokens != state["image_tokens"]:
            raise ConfigError(
                f"image_tokens: expected {state['image_tokens']}, which {checkpoint} was trained "
                f"with, got {self.config.image_tokens}"
            )
        main = self.accelerator.is_main_process
        if main:
            self.counts += Counter(state["counts"])
        if self._any_rank(main and state["batches"] != self.batches(self.step)):
            raise ConfigError(
                f"resume: the steps of {checkpoint} were made of other batches; expected the "
                "records, batch sizes, task weights, seed, number of processes and what else says "
                "which records there are (on_error, max_length) as they were then"
                + "".join(f"; {change}" for change in self._changes())
            )

    def _changes(self) -> list[str]:
        """Which settings are other than they were before."""
        path = self.folder / CONFIG
        if not path.exists():
            return []
        try:
            before = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            return [f"what has changed is not known, {path} is damaged: {error}"]
        return [
            f"{key} is {value!r}, was {before.get(key)!r}"
            for key, value in dataclasses.asdict(self.config).items()
            if key not in ("resume", "output") and value != before.get(key)
        ]

    def elapsed(self) -> float:
        """Seconds of training so far, earlier starts counted in."""
        return self.seconds + time.monotonic() - self._since

    def steps(self, label: str) -> Iterator[int]:
        """The steps left, with a progress bar; checkpoints when due, at the end and on Ctrl-C.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step under way was finished and saved.
        """
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=label,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with bar, stop_signal() as asked_to_stop:
            while self.step < self.config.steps:
                self._began = time.monotonic()
                yield self.step
                self.step += 1
                bar.update()
                stop = self._any_rank(bool(asked_to_stop))
                due = self.step % self.config.save_every == 0 or self.step == self.config.steps
                if due or stop:
                    self.save()
                if stop and self.step < self.config.steps:
                    raise Interrupted(
                        f"stopped after step {self.step}; go on with resume=true output="
                        f"{self.folder}"
                    )
                bar.set_postfix(self._shown, refresh=False)

    def update(self, values: Mapping[str, float], tokens: float) -> None:
        """What ends a step: gradients are clipped, the optimizers make their step, it is logged.

        Args:
            values: "loss", of all processes together, and what else the log is to hold.
            tokens: that went through the model, in all processes together.

        Raises:
            Diverged: the loss or the gradient is not finite; the weights were left as they were.
        """
        config = self.config
        norm = self.accelerator.clip_grad_norm_(
            self.trained.parameters(), config.grad_clip or math.inf
        )
        self.check_finite(loss=values["loss"], gradient=float(norm))
        scale = learning_rate_scale(self.step, config)
        set_learning_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.log({
            **values,
            **{name: rate * scale for name, rate in learning_rates(config).items()},
            "grad_norm": float(norm),
            "tokens_per_second": tokens / (time.monotonic() - self._began),
            "memory_gib": peak_memory(self.accelerator.device),
        })  # fmt: skip

    def log(self, values: Mapping[str, float]) -> None:
        """Note a step's values; every `log_every` steps their means are written, each over the
        steps that had it, and how much was counted so far in all processes."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(float(value))
        done = self.step + 1
        if done % self.config.log_every and done < self.config.steps:
            return
        means = {name: sum(seen) / len(seen) for name, seen in self._values.items()}
        self._values = {}
        self._shown = {k: f"{v:.3g}" for k, v in means.items() if k.startswith("loss")}
        counts = self.all_counts()
        if self.accelerator.is_main_process:
            line: dict[str, Any] = {"step": done, "seconds": round(self.elapsed(), 3), **means}
            line |= {"counts": dict(sorted(counts.items()))} if counts else {}
            path = self.folder / LOG
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def check_finite(self, **values: float) -> None:
        """Raise Diverged unless all are finite numbers; for before the weights are changed."""
        for name, value in values.items():
            if not math.isfinite(value):
                kept = latest_checkpoint(self.folder)
                ahead = (
                    f"{kept} is intact, resume=true goes on from it" if kept else "no checkpoint"
                )
                raise Diverged(f"step {self.step + 1}: {name} is {value}; {ahead}")

    def all_counts(self) -> Counter[str]:
        """`counts` of all ranks."""
        return sum(map(Counter, gather_object([dict(self.counts)])), Counter())

    def save(self) -> None:
        """Write a checkpoint of the step reached."""
        counts = self.all_counts()
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder,
                self.step,
                modules=self.modules,
                optimizers=self.optimizers,
                state={
                    "seconds": self.elapsed(),
                    "values": self._values,
                    "counts": counts,
                    "batches": self.batches(self.step),
                    "image_tokens": self.config.image_tokens,
                },
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _any_rank(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum").item() > 0)

    def _trim_log(self) -> None:
        """Drop log lines past the step resumed from: they will be written again."""
        path = self.folder / LOG
        if not path.exists():
            return
        kept = [line for line in read_log(self.folder) if line["step"] <= self.step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line cut by a crash is left out, and so are damaged ones,
    whose number it says."""
    path = Path(folder) / LOG
    lines, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        try:
            value = json.loads(line)
            lines.append({**value, "step": int(value["step"])})
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        tqdm.write(f"{path}: {damaged} damaged line(s) left out", file=sys.stderr)
    return lines


def seeded(*numbers: int) -> torch.Generator:
    """A generator on the CPU that depends on all the numbers (seed, step, rank, ...)."""
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, "uint64")[0] >> 1))
    return generator
