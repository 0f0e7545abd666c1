"""One optimizer step: AdamW that survives a loss which is not finite, and never waits for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from engine.training.averaged import Averaged
from engine.training.precision import LossScale
from engine.training.sharded import ShardedGradients
from engine.training.snapshot import Snapshot
from engine.training.world import ALONE, World

# A run of this many bad steps means that the weights themselves are bad, not one unlucky batch.
BAD_STEPS_IN_A_ROW = 3
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""
BETAS = (0.9, 0.999)
"""Its rates of forgetting."""


class Diverged(Exception):
    """Non-finite steps in a row; the caller decides whether to start over more gently."""

    def __init__(self, step: int, in_a_row: int) -> None:
        super().__init__(f"non-finite loss up to step {step}")
        self.step = step
        self.in_a_row = in_a_row


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate. ``kind`` names it in reports (weights, scales, ...)."""

    kind: str
    parameters: list[nn.Parameter]
    lr: float


class Stepper:
    """AdamW whose step is not applied when the loss is not finite, without waiting for the device.

    The loss's finiteness goes to the fused kernel as its ``found_inf`` flag, the way gradient scaling does
    it, so the decision is taken on the device. The number of bad steps in a row is counted there too and read
    only when a metric is due; a bad step is never applied in the meantime, so finding out late loses nothing
    but time.

    With float16 arithmetic the loss is scaled (:class:`LossScale`); an overflow while the factor is above 1
    does not count as a bad step.

    With several ranks the gradients of all of them are added up before a step. Of ``weights`` each rank steps
    its own part only (:mod:`engine.training.sharded`); the others of few numbers are stepped by all alike.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        *,
        weight_decay: float,
        grad_clip: float,
        device: torch.device,
        dtype: torch.dtype,
        betas: tuple[float, float] = BETAS,
        world: World = ALONE,
    ) -> None:
        self.betas, self.world, self.device = betas, world, device
        self.groups = [g for g in groups if g.parameters]
        self.parameters = [p for g in self.groups for p in g.parameters]
        self.grad_clip = grad_clip
        self.scale = LossScale(device, enabled=dtype == torch.float16)
        # Of what is shared out, this rank's part, by the parameter's identity.
        self._owned = {id(p): nn.Parameter(world.part(p)) for p in self.shared_out()} if world.several else {}
        """Called with a loss: the loss as the backward pass should see it."""
        self.optimizer = AdamW(
            [{"params": [*map(self.stepped, g.parameters)], "lr": g.lr} for g in self.groups],
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
        self._averaged: Averaged | None = None
        self._sharded: ShardedGradients | None = None
        self._gathered: dict[str, Tensor] | None = None

    # What is shared out

    def shared_out(self) -> list[nn.Parameter]:
        """Those of which each of several ranks steps its own part."""
        weights = (p for group in self.groups if group.kind == "weights" for p in group.parameters)
        return [p for p in weights if p.is_contiguous() and self.world.divides(p.numel())]

    def stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer steps of a parameter here."""
        return self._owned.get(id(parameter), parameter)

    @property
    def sharded(self) -> bool:
        """Whether this rank's state is a part of the whole."""
        return bool(self._owned)

    def gather_values(self) -> None:
        """Make the parameters whole on every rank. All ranks call it together."""

    def gather_state(self) -> None:
        """Make the parameters whole, and have the first rank's next :meth:`state_dict` be whole. All ranks
        call it together; what it gathers is freed when it was read."""
        if not self.sharded:
            return
        self.gather_values()
        gathered: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            if id(parameter) in self._owned:
                for name, value in self.optimizer.state.get(self.stepped(parameter), {}).items():
                    if not value.ndim:
                        continue  # how many steps there were
                    whole = torch.empty_like(parameter)
                    self.world.part(whole).copy_(value)
                    self.world.join_parts(whole)()
                    if self.world.rank == 0:  # which alone keeps it
                        gathered[f"{index}.{name}"] = whole.cpu()
        self._gathered = gathered

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

    # Several ranks

    def average(self, loss: Tensor, part: float | None) -> Tensor:
        """Make the gradients, and the ``loss`` that is handed back, those of the batch of all ranks, of which
        this one had ``part`` (none: as much as each)."""
        if not self.world.several:
            return loss
        gradients = [p.grad for p in self.parameters]
        # What no rank has a gradient of is not trained by this step, as by one process.
        lacks = self.world.least([gradient is None for gradient in gradients])
        common = [p for p in self.parameters if id(p) not in self._owned]
        shared = [p for p in self.parameters if id(p) in self._owned]
        if self._averaged is None:
            self._averaged = Averaged(self.world, common, self.device)
            self._sharded = ShardedGradients(self.world, shared, self.device) if shared else None
        loss = self._averaged([p.grad for p in common], loss, part)
        found = dict(zip(map(id, common), self._averaged.gradients, strict=True))
        if self._sharded is not None:
            self._sharded([p.grad for p in shared], part)()
            found |= zip(map(id, shared), self._sharded.parts, strict=True)
        for parameter, lacking in zip(self.parameters, lacks, strict=True):
            parameter.grad = None
            self.stepped(parameter).grad = None if lacking else found[id(parameter)]
        return loss

    # A step

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Apply the accumulated gradients unless ``loss`` or their norm is not finite; clears them."""
        self.steps += 1
        stepped = [*map(self.stepped, self.parameters)]
        scaled_norm = self._norm(stepped)
        self.grad_norm = scaled_norm / self.scale.factor if self.scale.enabled else scaled_norm
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(stepped, self.grad_clip, self.grad_norm)
        self.apply(self.judge(scaled_norm, loss))
        self.optimizer.zero_grad(set_to_none=True)
        if self._sharded is not None:
            self._sharded.join([p for p in self.parameters if id(p) in self._owned])

    def _norm(self, stepped: Sequence[nn.Parameter]) -> Tensor:
        """Of all gradients, the same on every rank."""
        if not self.sharded:
            return torch.nn.utils.get_total_norm([p.grad for p in stepped if p.grad is not None])
        owned = {id(part) for part in self._owned.values()}
        own = [p.grad for p in stepped if p.grad is not None and id(p) in owned]
        common = [p.grad for p in stepped if p.grad is not None and id(p) not in owned]
        squares = torch.nn.utils.get_total_norm(own).square().to(self.device)
        self.world.add_(squares)
        return (squares + torch.nn.utils.get_total_norm(common).square().to(self.device)).sqrt()

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
        for parameter in self.parameters:
            parameter.grad = None

    def check(self, step: int, *, last: bool = False) -> None:
        """Read the counter back; raises :class:`Diverged` after three bad steps in a row.

        A training may have fewer steps than that; then, at its ``last`` check, all of them bad are enough.
        """
        limit = min(BAD_STEPS_IN_A_ROW, self.steps) if last else BAD_STEPS_IN_A_ROW
        worst = int(self.worst_in_a_row.item())
        if worst >= limit:
            raise Diverged(step, worst)

    def state_dict(self) -> Snapshot:
        """Parameters, moments, counters; the learning rates follow from the step. Where they are shared out,
        :meth:`gather_state` has to come before it."""
        gathered, self._gathered = self._gathered, None
        assert gathered is not None or not self.sharded, "a state of which this rank has a part"
        tensors = {"bad": self.bad_in_a_row, "worst": self.worst_in_a_row, "grad_norm": self.grad_norm}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.value"] = parameter.detach()
            for name, value in self.optimizer.state.get(self.stepped(parameter), {}).items():
                tensors[f"{index}.{name}"] = (gathered or {}).get(f"{index}.{name}", value)
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
            if id(parameter) in self._owned:  # of the whole, the part that is this rank's
                found = {n: v if v.ndim == 0 else self.world.part(v.contiguous()) for n, v in found.items()}
            if found:  # none before the first step
                moments[index] = found
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.steps = snapshot.facts["steps"]
        self.scale.load_state_dict(snapshot.facts["scaler"])
