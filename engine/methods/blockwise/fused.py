"""AdamW for a block whose linears keep their quantized weights: the optimizer's step, the way back through
the quantizer and the new quantized weights in one pass over memory (:mod:`engine.quant.quant_step`).

What the plain :class:`Stepper` does in a dozen passes over the weights happens here in one. The result is the
same up to the rounding of single operations, and so is everything around it: bad steps are skipped on the
device, float16's loss is scaled, the state that is saved has the same names and meaning.

Nothing here waits for the device or allocates what the next step needs, so a step can be recorded and
replayed (:mod:`engine.gpu.recorded`).

With several ranks each takes the step of its part of every linear, whole groups of it, and the others learn
the integers that came of it (:mod:`engine.quant.shard_kernel`). A linear whose groups the ranks cannot share
out evenly is stepped by all alike. Most of that goes on at the same time
(:mod:`engine.methods.blockwise.shared_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.gpu.recorded import Graphed
from engine.methods.blockwise.shared_step import Portion, QuantSteps, Row, portions
from engine.quant.announced import Announcements
from engine.quant.fake_linear import FakeQuantLinear
from engine.quant.quant_step import GRAD_FACTOR, Moments, QuantStep
from engine.quant.shard_kernel import Part
from engine.quant.step_decision import Decision
from engine.training.averaged import Averaged
from engine.training.snapshot import Snapshot
from engine.training.stepper import BETAS, ParameterGroup, Stepper
from engine.training.world import ALONE, World

T = TypeVar("T")


class FusedStepper(Stepper):
    """A :class:`Stepper` over a block's linears (``quantized`` weights in place) and its other parameters.

    Whoever runs the backward pass puts the gradients into ``gradients``: those of the linears' quantized
    weights in their order, then those of ``others`` in theirs. ``fixed`` says that they will lie at the same
    addresses from now on; then the step is recorded. ``sums_up`` says that they are added to, and have to be
    zero after a step.

    Of ``announcements`` the linears' gradients are told by their numbers; ``as_announced`` says that
    ``gradients`` holds them as they were.

    With several ranks the step reads what all of them have got together, which lies at the same addresses
    whatever became of ``gradients``. Then ``weight``, ``scale`` and ``zero_point`` of the linears are up to
    date only in the part that is this rank's, until :meth:`gather_values`; ``quantized`` is whole.
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
        announcements: Announcements | None = None,
    ) -> None:
        self.linears = list(linears)
        super().__init__(
            groups,
            weight_decay=weight_decay,
            grad_clip=0.0,
            device=device,
            dtype=dtype,
            betas=betas,
            world=world,
        )
        self.gradients: Sequence[Tensor] = ()
        self.fixed = self.sums_up = self.as_announced = False
        self._announcements = announcements
        self._ran = False
        self._decay = weight_decay
        inner = {id(p) for linear in self.linears for p in linear.parameters()}
        self.others: list[nn.Parameter] = [p for p in self.parameters if id(p) not in inner]
        self._loss = torch.zeros((), device=device)
        self._factor = torch.ones((), device=device)
        self._decision = Decision(
            betas, device, bad=self.bad_in_a_row, worst=self.worst_in_a_row, scaled=self.scale.enabled
        )
        self._controls = self._decision.controls
        self._common: QuantSteps
        self._portions: list[Portion] = []
        """Of what is shared out."""
        self._common_squares = torch.zeros((), device=device)
        self._on_failure = on_failure
        self._bind()
        self._graph = Graphed(self._apply, device, on_failure)

    # The tensors

    def shared_out(self) -> list[nn.Parameter]:
        trained = {id(p) for p in self.parameters}
        shared = (p for one in self.linears if self._is_shared(one) for p in _parameters(one))
        return [p for p in shared if id(p) in trained]

    def _is_shared(self, linear: FakeQuantLinear) -> bool:
        """Whether each rank steps whole groups of it, as many as any other."""
        trained = {id(p) for p in self.parameters}
        divides = self.world.several and self.world.divides(linear.scale.numel())
        plain = all(p.is_contiguous() for p in _parameters(linear))
        return divides and plain and any(id(p) in trained for p in _parameters(linear))

    def gather_values(self) -> None:
        for parameter in self.shared_out() if self.sharded else ():
            self.world.join_parts(parameter)()

    def _bind(self) -> None:
        """Point the kernels at the parameters and at AdamW's state of them, which is made where it is
        missing."""
        rates = {id(p): group.lr for group in self.groups for p in group.parameters}
        self._shares = [self._is_shared(linear) for linear in self.linears]
        common, shared = _by(self._shares, self.linears)
        self._common = self._kernels_of(common, rates)
        quantized = [linear.quantized for linear in shared if linear.quantized is not None]
        self._places = portions(weight.nbytes for weight in quantized)
        numbers = [number for number, is_shared in enumerate(self._shares) if is_shared]
        self._portions = [
            Portion(
                self.world,
                [quantized[index] for index in places],
                self._kernels_of([shared[index] for index in places], rates),
                [self._sent(shared[index]) for index in places],
                [numbers[index] for index in places],
                self._controls,
                self._on_failure,
            )
            for places in self._places
        ]
        self._row = Row(self._portions, self.device, at_once=self._announcements is not None)
        self._outer_rates: list[tuple[Tensor, float]] = []
        """Of the parameters that torch steps, and what they are before the schedule."""
        outer = {id(p) for p in self.others}
        for group, state in zip(self.groups, self.optimizer.param_groups, strict=True):
            # A tensor, so that a recorded step sees it change.
            state["lr"] = torch.full((), group.lr, device=self._loss.device)
            if any(id(p) in outer for p in group.parameters):
                self._outer_rates.append((state["lr"], group.lr))

    def _kernels_of(self, linears: list[FakeQuantLinear], rates: dict[int, float]) -> QuantSteps:
        kernels = [self._kernel(linear, rates) for linear in linears]
        counts = [kernel.programs() for kernel in kernels]
        squares = torch.zeros(sum(counts), device=self.device)
        return QuantSteps(kernels, squares, squares.split(counts))

    def _kernel(self, linear: FakeQuantLinear, rates: dict[int, float]) -> QuantStep:
        parameters = _parameters(linear)
        part = self.world.part if self._is_shared(linear) else torch.Tensor.detach
        weight, scale, zero_point = (self._moments(p, part(p), rates.get(id(p))) for p in parameters)
        assert linear.quantized is not None
        return QuantStep(
            weight,
            scale,
            zero_point,
            scale_floor=part(linear.scale_floor),
            quantized=part(linear.quantized),
            bits=linear.grid.bits,
            trains=tuple(id(p) in rates for p in parameters),
            betas=self.betas,
            eps=self.optimizer.defaults["eps"],
            weight_decay=self._decay,
            in_steps=linear.in_steps,
        )

    def _sent(self, linear: FakeQuantLinear) -> Part:
        """What the others learn of this rank's part of a linear."""
        weight, scale, zero = map(self.world.part, _parameters(linear))
        assert linear.quantized is not None
        room = linear.quantized.detach()
        return Part(weight, scale, zero, room, linear.grid.bits, linear.in_steps)

    def _moments(self, parameter: nn.Parameter, value: Tensor, lr: float | None) -> Moments:
        """Of the part ``value`` that is stepped here."""
        if lr is None:  # not trained
            return Moments(value, value, value, 0.0)
        state: dict[str, Any] = self.optimizer.state[self.stepped(parameter)]
        if not state:
            # As torch's AdamW would make it.
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(value)
            state["exp_avg_sq"] = torch.zeros_like(value)
        return Moments(value, state["exp_avg"], state["exp_avg_sq"], lr)

    @torch.no_grad()
    def requantize(self) -> None:
        """The quantized weights of the parameters as they are now, which are whole."""
        self._common.requantize(self._controls)
        for portion in self._portions:
            portion.requantize()

    # A step

    def set_lr(self, factor: float) -> None:
        self._lr_factor = factor
        self._factor.fill_(factor)

    def average(self, loss: Tensor, part: float | None) -> Tensor:
        if not self.world.several:
            return loss
        quantized = [linear.quantized for linear in self.linears if linear.quantized is not None]
        trained = [weight for weight in quantized if weight.requires_grad]
        shares = [*(self._shares if trained else ()), *([False] * len(self.others))]
        common, _ = _by(shares, [*trained, *self.others])
        found: Sequence[Tensor | None] = self.gradients or [None] * len(shares)
        gradients, shared = _by(shares, found)
        if self._averaged is None:
            self._averaged = Averaged(self.world, [*common, self.grad_norm], self.device)
        given = [[shared[index] for index in places] for places in self._places]
        # A gradient that counts for more or less than another rank's is changed before it is sent.
        as_announced = self.as_announced and part is None
        # Whether what is shared out is finite, as far as it came about here, goes along with the loss.
        squares = self._row.add(given, part, self._announcements if as_announced else None)
        return self._averaged([*gradients, squares], loss, part)

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        self.steps += 1
        self._loss.copy_(loss)
        recorded = (self.fixed or self._averaged is not None) and self._ran
        self._graph() if recorded else self._apply()
        if self._portions:
            self._row.step(recorded=recorded)
            self.grad_norm.copy_((self._common_squares + self._row.squared()).sqrt())
        if self._averaged is not None and self.sums_up:  # now that nobody reads them any more
            torch._foreach_zero_(list(self.gradients))
        if not recorded and not self.fixed and not self.sums_up:
            self.gradients = ()
        self._ran = True

    def _apply(self) -> None:
        """All but what is shared out, of which only the squares are known here."""
        gradients = list(self.gradients if self._averaged is None else self._averaged.gradients)
        known = [] if self._averaged is None else [gradients.pop()]
        own = gradients[: len(self._common.steps)] if len(gradients) > len(self.others) else []
        outer = gradients[len(own) :]
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32) if gradients else ()
        skip = self._decision(torch.stack([*norms, *known]), self._loss, self._factor, self.scale.factor)
        self._common.apply(own, self._controls)
        for parameter, gradient in zip(self.others, outer, strict=True):
            parameter.grad = gradient
        for rate, lr in self._outer_rates:
            rate.copy_(lr * self._factor)
        total = self._common.squares.sum()
        if outer:
            total = total + torch.stack(torch._foreach_norm(outer, 2.0)).square().sum() * (
                self._controls[GRAD_FACTOR].square()
            )
        if self._portions:
            self._common_squares.copy_(total)
        else:
            self.grad_norm.copy_(total.sqrt())
        self.apply(skip)
        for parameter in self.others:
            parameter.grad = None
        if self.sums_up and self._averaged is None:
            torch._foreach_zero_(gradients)

    def drop_gradients(self) -> None:
        self.gradients = ()
        self.sums_up = False
        self.forget_graph()

    def forget_graph(self) -> None:
        """The gradients' addresses are no longer those that were recorded."""
        self.fixed = False
        self._graph.forget()
        for portion in self._portions:
            portion.forget_graph()

    # The state

    def state_dict(self) -> Snapshot:
        count = self._decision.count.float()
        for linear in self.linears:
            for parameter in map(self.stepped, _parameters(linear)):
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
        states = [self.optimizer.state[p] for p in map(self.stepped, self.parameters)]
        states = [state for state in states if "step" in state]
        self._decision.taken(int(states[0]["step"]) if states else 0)
        self.requantize()


def _parameters(linear: FakeQuantLinear) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    return linear.weight, linear.scale, linear.zero_point


def _by(flags: Sequence[bool], values: Sequence[T]) -> tuple[list[T], list[T]]:
    """Those whose flag is not set, and those whose flag is."""
    pairs = list(zip(flags, values, strict=True))
    return [value for flag, value in pairs if not flag], [value for flag, value in pairs if flag]
