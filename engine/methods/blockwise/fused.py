"""AdamW for a block whose linears keep their quantized weights: the optimizer's step, the way back through
the quantizer and the new quantized weights in one pass over memory (:mod:`engine.quant.quant_step`).

What the plain :class:`Stepper` does in a dozen passes over the weights happens here in one. The result is the
same up to the rounding of single operations, and so is everything around it: bad steps are skipped on the
device, float16's loss is scaled, the state that is saved has the same names and meaning.

Nothing here waits for the device or allocates what the next step needs, so a step can be recorded and
replayed (:mod:`engine.gpu.recorded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.gpu.recorded import Graphed
from engine.quant.fake_linear import FakeQuantLinear
from engine.quant.quant_step import (
    CONTROLS,
    CORRECTION1,
    GRAD_FACTOR,
    LR_FACTOR,
    ROOT_CORRECTION2,
    SKIP,
    Moments,
    QuantStep,
)
from engine.training.averaged import Averaged
from engine.training.snapshot import Snapshot
from engine.training.stepper import BETAS, ParameterGroup, Stepper
from engine.training.world import ALONE, World


class FusedStepper(Stepper):
    """A :class:`Stepper` over a block's linears (``quantized`` weights in place) and its other parameters.

    Whoever runs the backward pass puts the gradients into ``gradients``: those of the linears' quantized
    weights in their order, then those of ``others`` in theirs. ``fixed`` says that they will lie at the same
    addresses from now on; then the step is recorded. ``sums_up`` says that they are added to, and have to be
    zero after a step.

    With several ranks the step reads what all of them have got together, which lies at the same addresses
    whatever became of ``gradients``.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        linears: Iterable[FakeQuantLinear],
        *,
        weight_decay: float,
        device: torch.device,
        dtype: torch.dtype,
        on_failure: Callable[[str], None],
        betas: tuple[float, float] = BETAS,
        world: World = ALONE,
    ) -> None:
        super().__init__(
            groups,
            weight_decay=weight_decay,
            grad_clip=0.0,
            device=device,
            dtype=dtype,
            betas=betas,
            world=world,
        )
        self.linears = list(linears)
        self.gradients: Sequence[Tensor] = ()
        self.fixed = self.sums_up = False
        self._ran = False
        self._decay = weight_decay
        inner = {id(p) for linear in self.linears for p in linear.parameters()}
        self.others: list[nn.Parameter] = [p for p in self.parameters if id(p) not in inner]
        self._loss = torch.zeros((), device=device)
        self._factor = torch.ones((), device=device)
        self._controls = torch.zeros(CONTROLS, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        """Steps that were applied; float64, because bias corrections are differences of nearly equal
        numbers."""
        self._squares: Tensor
        self._kernels: list[QuantStep] = []
        self._bind()
        self._graph = Graphed(self._apply, device, on_failure)

    # The tensors

    def _bind(self) -> None:
        """Point the kernels at the parameters and at AdamW's state of them, which is made where it is
        missing."""
        rates = {id(p): group.lr for group in self.groups for p in group.parameters}
        self._kernels = [self._kernel(linear, rates) for linear in self.linears]
        counts = [kernel.programs() for kernel in self._kernels]
        self._squares = torch.zeros(sum(counts), device=self._loss.device)
        self._parts = self._squares.split(counts)
        for group, state in zip(self.groups, self.optimizer.param_groups, strict=True):
            # A tensor, so that a recorded step sees it change.
            state["lr"] = torch.full((), group.lr, device=self._loss.device)

    def _kernel(self, linear: FakeQuantLinear, rates: dict[int, float]) -> QuantStep:
        parameters = (linear.weight, linear.scale, linear.zero_point)
        weight, scale, zero_point = (self._moments(p, rates.get(id(p))) for p in parameters)
        assert linear.quantized is not None
        return QuantStep(
            weight,
            scale,
            zero_point,
            scale_floor=linear.scale_floor,
            quantized=linear.quantized.data,
            bits=linear.grid.bits,
            trains=tuple(id(p) in rates for p in parameters),
            betas=self.betas,
            eps=self.optimizer.defaults["eps"],
            weight_decay=self._decay,
            in_steps=linear.in_steps,
        )

    def _moments(self, parameter: nn.Parameter, lr: float | None) -> Moments:
        if lr is None:  # not trained
            return Moments(parameter.data, parameter.data, parameter.data, 0.0)
        state: dict[str, Any] = self.optimizer.state[parameter]
        if not state:
            # As torch's AdamW would make it.
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return Moments(parameter.data, state["exp_avg"], state["exp_avg_sq"], lr)

    @torch.no_grad()
    def requantize(self) -> None:
        """The quantized weights of the parameters as they are now."""
        for kernel, squares in zip(self._kernels, self._parts, strict=True):
            kernel.requantize(self._controls, squares)

    # A step

    def set_lr(self, factor: float) -> None:
        self._lr_factor = factor
        self._factor.fill_(factor)

    def average(self, loss: Tensor, part: float | None) -> Tensor:
        if not self.world.several:
            return loss
        if self._averaged is None:
            quantized = [linear.quantized for linear in self.linears if linear.quantized is not None]
            trained = [weight for weight in quantized if weight.requires_grad]
            self._averaged = Averaged(self.world, [*trained, *self.others], self.device)
        found: Sequence[Tensor | None] = self.gradients or [None] * len(self._averaged.gradients)
        loss = self._averaged(found, loss, part)
        if self.sums_up and self.gradients:
            torch._foreach_zero_(list(self.gradients))
        return loss

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        self.steps += 1
        self._loss.copy_(loss)
        if (self.fixed or self._averaged is not None) and self._ran:
            self._graph()
        else:
            self._apply()
            if not self.fixed and not self.sums_up:
                self.gradients = ()
        self._ran = True

    def _apply(self) -> None:
        gradients = self.gradients if self._averaged is None else self._averaged.gradients
        controls, factor = self._controls, self._factor
        norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
        skip = self.judge(torch.stack(norms).norm(), self._loss)
        self._count.add_(1 - skip)
        controls[SKIP].copy_(skip)
        controls[LR_FACTOR].copy_(factor)
        controls[CORRECTION1].copy_(1 - self.betas[0] ** self._count)
        controls[ROOT_CORRECTION2].copy_((1 - self.betas[1] ** self._count).sqrt())
        controls[GRAD_FACTOR].copy_(1 / self.scale.factor)
        own = gradients[: len(self.linears)] if len(gradients) > len(self.others) else ()
        for kernel, gradient, squares in zip(self._kernels, own, self._parts, strict=bool(own)):
            kernel.apply(gradient, controls, squares)
        outer = gradients[len(own) :]
        for parameter, gradient in zip(self.others, outer, strict=True):
            parameter.grad = gradient
        for group, state in zip(self.groups, self.optimizer.param_groups, strict=True):
            state["lr"].copy_(group.lr * factor)
        total = self._squares.sum()
        if outer:
            total = total + torch.stack(torch._foreach_norm(list(outer), 2.0)).square().sum() * (
                controls[GRAD_FACTOR].square()
            )
        self.grad_norm.copy_(total.sqrt())
        self.apply(skip)
        for parameter in self.others:
            parameter.grad = None
        if self.sums_up and self._averaged is None:
            torch._foreach_zero_(list(gradients))

    def drop_gradients(self) -> None:
        self.gradients = ()
        self.sums_up = False
        self.forget_graph()

    def forget_graph(self) -> None:
        """The gradients' addresses are no longer those that were recorded."""
        self.fixed = False
        self._graph.forget()

    # The state

    def state_dict(self) -> Snapshot:
        count = self._count.float()
        for linear in self.linears:
            for parameter in (linear.weight, linear.scale, linear.zero_point):
                if parameter in self.optimizer.state:
                    self.optimizer.state[parameter]["step"].copy_(count)
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, snapshot: Snapshot) -> None:
        self.forget_graph()
        grad_norm = self.grad_norm
        super().load_state_dict(snapshot)
        self.grad_norm = grad_norm.copy_(self.grad_norm)  # the address stays
        self._bind()
        states = [self.optimizer.state[p] for p in self.parameters if "step" in self.optimizer.state[p]]
        self._count.copy_(states[0]["step"] if states else torch.zeros(()))
        self.requantize()
