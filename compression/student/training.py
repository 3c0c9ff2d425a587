"""The training loop: products in bf16 where the device has them; done when its time is over, goes on after a break."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from compression.errors import CompressionError
from compression.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from compression.student.model import Student, balance_loss, initialise
from compression.student.shape import Shape
from compression.student.tokens import Batches

LOG = "log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate and sizes. A run that goes on should have the same.

    The rate falls with the time that is used up, so that a run ends well on a faster or a slower machine.
    """

    seconds: float = 420.0
    """Of all calls together; the run is finished when they are used up, or after ``steps``."""
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

    def share(self, progress: Progress) -> float:
        """How much of the run is done, of its time or of its steps; at least 1 when it is finished."""
        return max(progress.step / self.steps, progress.seconds / self.seconds)

    def rate(self, progress: Progress, first: int) -> float:
        """Of the next step, in a call that began with step ``first``: up, then straight down to nothing."""
        rising = min(1.0, (progress.step + 1) / self.warmup)
        again = min(1.0, (progress.step - first + 1) / self.rewarm) if first else 1.0
        return self.peak * min(rising, max(0.0, 1 - self.share(progress))) * again


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
    save_every: float = 60.0,
) -> Outcome:
    """Train until the run is finished, for at most about ``seconds`` now; the last checkpoint is of the last step.

    ``validation`` is (windows, length + 1). Raises CompressionError for a damaged checkpoint and for a loss that is no
    number.
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
    return Outcome(loop.progress, schedule.share(loop.progress) >= 1)


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
        while self.schedule.share(self.progress) < 1 and self.clock() - self.started < seconds:
            step = self.progress.step
            loss, usage = self._step()
            self.progress = Progress(step + 1, self.before.seconds + self.clock() - self.started)
            due = self.clock() - saved > save_every
            if due or step % self.schedule.log_every == 0:
                self._log_step(step, loss, usage)
            if (step + 1) % self.schedule.validate_every == 0:
                self._log({"step": step + 1, "validation": self._validate()})
            if due:
                save_checkpoint(self.run, self.model, self.progress)
                saved = self.clock()
        self._log({"step": self.progress.step, "validation": self._validate()})
        save_checkpoint(self.run, self.model, self.progress)

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's mean loss, and (mixtures, 2, experts) as of ``Mixture``."""
        schedule, model = self.schedule, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(self.progress, self.before.step)
        losses, usages = [], []
        tokens, targets = self.ids.step(self.progress.step)
        for part, following in zip(tokens.chunk(schedule.parts), targets.chunk(schedule.parts), strict=True):
            with self._precision():
                logits, usage = model(part)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
            whole = loss + schedule.balance * balance_loss(usage).sum()
            torch.autograd.backward(whole * (part.shape[0] / tokens.shape[0]))
            losses.append(loss.detach())
            usages.append(usage.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean(), torch.stack(usages).mean(dim=0)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=_multiplies_bfloat16(self.device))

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

    def _log_step(self, step: int, loss: torch.Tensor, usage: torch.Tensor) -> None:
        """Also the loads of the idlest and the busiest expert of all layers, 1 when all get the same."""
        loads = usage[:, 0]
        seen = {"loss": loss, "balance": balance_loss(usage).mean(), "idlest": loads.min(), "busiest": loads.max()}
        self._log({"step": step, **{name: value.item() for name, value in seen.items()}})

    def _log(self, values: dict[str, float]) -> None:
        """Comes before each checkpoint: one of a run that has diverged would replace a good one."""
        if not all(map(math.isfinite, values.values())):
            raise CompressionError(f"the run has diverged at step {values['step']}; the checkpoint before it is kept")
        seconds = self.before.seconds + self.clock() - self.started
        line = {**values, "seconds": round(seconds, 1)}
        with (self.run / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say("  ".join(f"{key} {value:.4g}" for key, value in line.items()))


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Elsewhere it is emulated, slowly."""
    supported: bool = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return supported


def _optimizer(model: Student, schedule: Schedule, device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": schedule.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.95), fused=device.type == "cuda")
