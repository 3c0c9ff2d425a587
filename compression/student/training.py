"""The training loop: bf16 on a GPU, float32 on the CPU; stops when its time is over, goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from compression.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from compression.student.model import Student, initialise
from compression.student.shape import Shape
from compression.student.tokens import Batches

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate and sizes. A run that goes on must have the same."""

    steps: int = 6000
    sequences: int = 64
    length: int = 1024
    parts: int = 2
    """A step's sequences are computed in so many pieces, for memory."""
    peak: float = 2e-3
    warmup: int = 150
    rewarm: int = 40
    """Steps over which the rate rises again after a break, while the optimizer's averages fill."""
    decay: float = 0.1
    balance: float = 0.01
    """Weight of each layer's balancing loss: no expert is left out, and yet some are busier than others."""
    seed: int = 0
    log_every: int = 50
    validate_every: int = 250

    def rate(self, step: int, first: int) -> float:
        """Learning rate of a step in a call that began with step ``first``: up, then straight down to nothing."""
        rising = min(1.0, (step + 1) / self.warmup)
        again = min(1.0, (step - first + 1) / self.rewarm) if first else 1.0
        falling = max(0.0, 1 - max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * min(rising, falling) * again


@dataclass(frozen=True, slots=True)
class Outcome:
    progress: Progress
    finished: bool


def train(
    run: Path,
    shape: Shape,
    schedule: Schedule,
    ids: Batches,
    validation: torch.Tensor,
    device: torch.device,
    seconds: float,
    clock: Callable[[], float],
    say: Callable[[str], None],
    save_every: float = 120.0,
) -> Outcome:
    """Train for at most about ``seconds``; the last checkpoint is always that of the last step.

    ``validation`` is (windows, length + 1). Raises CompressionError for a damaged checkpoint.
    """
    run.mkdir(parents=True, exist_ok=True)
    loaded = load_checkpoint(run, device)
    if loaded is None:
        model, before = Student(shape), Progress(0, 0.0)
        initialise(model, schedule.seed)
        model.to(device)
    else:
        model, before = loaded
    loop = _Loop(run, model, schedule, ids, validation.to(device), before, clock, say)
    loop.go(seconds, save_every)
    return Outcome(loop.progress, loop.progress.step >= schedule.steps)


class _Loop:
    def __init__(
        self,
        run: Path,
        model: Student,
        schedule: Schedule,
        ids: Batches,
        validation: torch.Tensor,
        before: Progress,
        clock: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self.run, self.model, self.schedule, self.ids = run, model, schedule, ids
        self.validation, self.before, self.clock, self.say = validation, before, clock, say
        self.progress = before
        self.started = clock()
        self.device = validation.device
        self.optimizer = _optimizer(model, schedule, self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            for layer in model.layers:
                layer.compile()

    def go(self, seconds: float, save_every: float) -> None:
        saved = self.started
        while self.progress.step < self.schedule.steps and self.clock() - self.started < seconds:
            step = self.progress.step
            logs = step % self.schedule.log_every == 0
            losses = self._step(step)
            self.progress = Progress(step + 1, self.before.seconds + self.clock() - self.started)
            if logs:
                self._log({"step": step, "loss": losses[0].item(), "balance": losses[1].item()})
            if (step + 1) % self.schedule.validate_every == 0:
                self._log({"step": step + 1, "validation": self._validate()})
            if self.clock() - saved > save_every:
                save_checkpoint(self.run, self.model, self.progress)
                saved = self.clock()
        self._log({"step": self.progress.step, "validation": self._validate()})
        save_checkpoint(self.run, self.model, self.progress)

    def _step(self, step: int) -> torch.Tensor:
        """(2,): the step's mean loss and mean balancing loss of a layer."""
        schedule, model = self.schedule, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(step, self.before.step)
        losses = torch.zeros(2, device=self.device)
        tokens, targets = self.ids.step(step)
        for part, following in zip(tokens.chunk(schedule.parts), targets.chunk(schedule.parts), strict=True):
            with self._precision():
                logits, balance = model(part)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
            share = part.shape[0] / tokens.shape[0]
            ((loss + schedule.balance * balance) * share).backward()
            losses += torch.stack((loss.detach(), balance.detach() / (model.shape.layers - 1))) * share
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss of a token, nats."""
        total = 0.0
        # Without gradients the layers would be compiled a second time.
        with torch.compiler.set_stance("force_eager"), self._precision():
            for window in torch.split(self.validation, max(1, self.schedule.sequences // self.schedule.parts)):
                logits, _ = self.model(window[:, :-1])
                loss = functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten(), reduction="sum")
                total += loss.item()
        return total / (self.validation.shape[0] * (self.validation.shape[1] - 1))

    def _log(self, values: dict[str, float]) -> None:
        seconds = self.before.seconds + self.clock() - self.started
        line = {**values, "seconds": round(seconds, 1)}
        with (self.run / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say("  ".join(f"{key} {value:.4g}" for key, value in line.items()))


def _optimizer(model: Student, schedule: Schedule, device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": schedule.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.95), fused=device.type == "cuda")
