"""The parts of a training: learning rates, the cosine schedule, steps that survive a non-finite loss, the
best state; and what it takes to save and continue them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

# A run of this many bad steps means that the weights themselves are bad, not one unlucky batch.
BAD_STEPS_IN_A_ROW = 3
MAX_ROLLBACKS = 2
GROWTH_INTERVAL = 2000
"""Good steps after which float16's loss scale is doubled."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""
NON_FINITE_HINT = (
    'check the model\'s weights, lower the learning rates, or use compute_dtype = "bfloat16" or "float32"'
)


class Progress(Protocol):
    """What a method tells whoever runs it. Every call is cheap unless :meth:`due` has said otherwise."""

    def due(self) -> bool:
        """Whether a metric would be written now; only then does the loop read numbers back from the
        device."""

    def metric(
        self,
        *,
        step: int,
        steps: int,
        epoch: int,
        loss: float,
        grad_norm: float | None = None,
        lr: Mapping[str, float] | None = None,
        tokens: int = 0,
        val_loss: float | None = None,
    ) -> None:
        """Report a step; ``tokens`` is the number trained on since the phase (or block) began."""

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """Report something the user should know that does not end the run."""

    def leave_if_asked(self) -> None:
        """Called where nothing is lost by leaving; raises StopRequested once a stop was asked for."""


class TrainingProgress(Progress, Protocol):
    """What a training tells whoever runs it."""

    def expect_silence(self, seconds: float) -> None:
        """One operation may take so long that nothing is heard meanwhile."""

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        """Called where a training can be continued from ``state()``, which is only asked for when needed.

        Saves it when a checkpoint is due; raises StopRequested, after saving it, once a stop was asked for.
        """


class Snapshot(NamedTuple):
    """The state of a training: tensors by name, and values that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def join(cls, parts: Mapping[str, Snapshot]) -> Snapshot:
        """Several as one; each part's names begin with its prefix."""
        tensors = {prefix + name: t for prefix, part in parts.items() for name, t in part.tensors.items()}
        facts = {prefix + name: f for prefix, part in parts.items() for name, f in part.facts.items()}
        return cls(tensors, facts)

    def part(self, prefix: str) -> Snapshot:
        """The part that was joined under ``prefix``."""
        cut = len(prefix)
        tensors = {name[cut:]: value for name, value in self.tensors.items() if name.startswith(prefix)}
        facts = {name[cut:]: value for name, value in self.facts.items() if name.startswith(prefix)}
        return Snapshot(tensors, facts)


class Diverged(Exception):
    """Non-finite steps in a row; the caller decides whether to start over more gently."""

    def __init__(self, step: int, in_a_row: int) -> None:
        super().__init__(f"non-finite loss up to step {step}")
        self.step = step
        self.in_a_row = in_a_row


def cosine_factor(step: int, steps: int, final_fraction: float, warmup_steps: int = 0) -> float:
    """Multiplier of the learning rate for ``step`` (from 0): linear warm-up, then a cosine to
    ``final_fraction``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    position = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate. ``kind`` names it in reports (weights, scales, ...)."""

    kind: str
    parameters: list[nn.Parameter]
    lr: float


class LossScale:
    """Keeps small float16 gradients from vanishing: the loss is multiplied before the backward pass, the
    gradients are divided after it.

    An overflow halves the factor (expected while it settles), 2000 good steps double it. Powers of two lose
    no bit. Everything happens on the device, in place, and so fits into a recorded graph.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def __call__(self, loss: Tensor) -> Tensor:
        return loss * self.factor if self.enabled else loss

    def update(self, overflowed: Tensor) -> None:
        """After a step; ``overflowed`` is 1 when its gradients did, else 0."""
        if not self.enabled:
            return
        good = (self.good_steps + 1) * (1 - overflowed)
        grown = (good >= GROWTH_INTERVAL).float()
        self.factor.mul_(1 - 0.5 * overflowed).mul_(1 + grown)
        self.good_steps.copy_(good * (1 - grown))

    def state_dict(self) -> dict[str, float]:
        """As values of JSON; waits for the device."""
        if not self.enabled:
            return {}
        return {"scale": self.factor.item(), "good_steps": self.good_steps.item()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if self.enabled:
            self.factor.fill_(state["scale"])
            self.good_steps.fill_(state.get("good_steps", 0.0))


class Stepper:
    """AdamW whose step is not applied when the loss is not finite, without waiting for the device.

    The loss's finiteness goes to the fused kernel as its ``found_inf`` flag, the way gradient scaling does
    it, so the decision is taken on the device. The number of bad steps in a row is counted there too and read
    only when a metric is due; a bad step is never applied in the meantime, so finding out late loses nothing
    but time.

    With float16 arithmetic the loss is scaled (:class:`LossScale`); an overflow while the factor is above 1
    does not count as a bad step.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        *,
        weight_decay: float,
        grad_clip: float,
        device: torch.device,
        dtype: torch.dtype,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.groups = [g for g in groups if g.parameters]
        self.parameters = [p for g in self.groups for p in g.parameters]
        self.grad_clip = grad_clip
        self.scale = LossScale(device, enabled=dtype == torch.float16)
        """Called with a loss: the loss as the backward pass should see it."""
        self.optimizer = AdamW(
            [{"params": g.parameters, "lr": g.lr} for g in self.groups],
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.bad_in_a_row = torch.zeros((), device=device)
        self.worst_in_a_row = torch.zeros((), device=device)
        self.steps = 0
        self.grad_norm = torch.zeros((), device=device)
        self._lr_factor = 1.0

    def set_lr(self, factor: float) -> None:
        self._lr_factor = factor
        for group, state in zip(self.groups, self.optimizer.param_groups, strict=True):
            state["lr"] = group.lr * factor

    def lr(self) -> dict[str, float]:
        """Mean learning rate of each kind of parameter, as set now."""
        rates: dict[str, list[float]] = {}
        for group in self.groups:
            rates.setdefault(group.kind, []).append(group.lr * self._lr_factor)
        return {kind: sum(values) / len(values) for kind, values in rates.items()}

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Apply the accumulated gradients unless ``loss`` or their norm is not finite; clears them."""
        self.steps += 1
        scaled_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.grad_norm = scaled_norm / self.scale.factor if self.scale.enabled else scaled_norm
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, self.grad_norm)
        self.apply(self.judge(scaled_norm, loss))
        self.optimizer.zero_grad(set_to_none=True)

    def judge(self, scaled_norm: Tensor, loss: Tensor) -> Tensor:
        """Whether this step is to be skipped (1 or 0, float32); counts the bad ones."""
        overflow = ~torch.isfinite(scaled_norm)
        nonsense = ~torch.isfinite(loss.detach())
        skip = (overflow | nonsense).float().reshape(())
        # Gradients that overflow while the factor settles are expected; unscaled ones are not.
        bad = skip
        if self.scale.enabled:
            bad = ((overflow & (self.scale.factor <= 1)) | nonsense).float().reshape(())
        self.bad_in_a_row.add_(1).mul_(bad)
        self.worst_in_a_row.copy_(torch.maximum(self.worst_in_a_row, self.bad_in_a_row))
        return skip

    def apply(self, skip: Tensor) -> None:
        """AdamW's step, if it is not to be skipped."""
        # The fused kernels of AdamW read these two attributes; torch.amp.GradScaler sets them the same way.
        self.optimizer.grad_scale = self.scale.factor if self.scale.enabled else None  # type: ignore[attr-defined]
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scale.update(skip)

    def drop_gradients(self) -> None:
        """Forget what has been added up."""
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, step: int, *, last: bool = False) -> None:
        """Read the counter back; raises :class:`Diverged` after three bad steps in a row.

        A training may have fewer steps than that; then, at its ``last`` check, all of them bad are enough.
        """
        limit = min(BAD_STEPS_IN_A_ROW, self.steps) if last else BAD_STEPS_IN_A_ROW
        worst = int(self.worst_in_a_row.item())
        if worst >= limit:
            raise Diverged(step, worst)

    def state_dict(self) -> Snapshot:
        """Parameters, moments, counters; the learning rates follow from the step."""
        tensors = {"bad": self.bad_in_a_row, "worst": self.worst_in_a_row, "grad_norm": self.grad_norm}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.value"] = parameter.detach()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{index}.{name}"] = value
        return Snapshot(tensors, {"steps": self.steps, "scaler": self.scale.state_dict()})

    @torch.no_grad()
    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Continue where another stepper of the same parameters stood."""
        tensors = snapshot.tensors
        self.bad_in_a_row.copy_(tensors["bad"])
        self.worst_in_a_row.copy_(tensors["worst"])
        self.grad_norm = tensors["grad_norm"].to(self.bad_in_a_row.device)
        moments: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"{index}.value"])
            found = {name: tensors[key] for name in MOMENTS if (key := f"{index}.{name}") in tensors}
            if found:  # none before the first step
                moments[index] = found
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.steps = snapshot.facts["steps"]
        self.scale.load_state_dict(snapshot.facts["scaler"])


class BestState:
    """The parameters' values at the start, and where they validated best.

    A GPU's memory is the scarcer one and these are read at most once or twice, so they lie on the host.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = self._copy()
        self.best: list[Tensor] | None = None
        self.val_loss: float | None = None

    def _copy(self) -> list[Tensor]:
        return [_aside(p.detach()) for p in self.parameters]

    @torch.no_grad()
    def _load(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def keep_if_best(self, val_loss: float | None, *, at_start: bool = False) -> bool:
        """Remember the current values if ``val_loss`` is the lowest so far; whether it is. ``at_start`` says
        that nothing was trained yet, so that there is nothing to copy."""
        if val_loss is None or not val_loss < (math.inf if self.val_loss is None else self.val_loss):
            return False
        self.val_loss = val_loss
        if at_start:
            self.best = self.start
        elif self.best is None or self.best is self.start:
            self.best = self._copy()
        else:  # in place: a third copy would be one too many
            for value, parameter in zip(self.best, self.parameters, strict=True):
                value.copy_(parameter.detach())
        return True

    def load_best(self) -> None:
        """Put the best values in place; without any validation the current ones stay."""
        if self.best is not None:
            self._load(self.best)

    def restart(self) -> None:
        """Back to the start, as if nothing had been trained or validated."""
        self._load(self.start)
        self.best = self.val_loss = None

    def state_dict(self) -> Snapshot:
        """The best values. Those of the start are not kept: they come from the model again."""
        best = {} if self.best is None else {str(index): value for index, value in enumerate(self.best)}
        return Snapshot(best, {"val_loss": self.val_loss})

    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Remember what another one of the same parameters did."""
        self.val_loss = snapshot.facts["val_loss"]
        values = [snapshot.tensors.get(str(index)) for index in range(len(self.parameters))]
        self.best = [value for value in values if value is not None] or None


def _aside(value: Tensor) -> Tensor:
    """A copy in host memory; page-locked, which is several times faster to copy to, for a GPU."""
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for 16-bit compute; a no-op context at float32."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
