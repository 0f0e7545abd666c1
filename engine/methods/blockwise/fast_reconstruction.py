"""Block-AP's steps as a GPU likes them: the mathematics of :mod:`engine.methods.blockwise.reconstruction`.

* The quantized weights are tensors of their own, so that forward and backward are those of an ordinary 16-bit
  block; one kernel a linear takes the gradient back through the quantizer, applies AdamW and quantizes anew
  (:mod:`engine.methods.blockwise.fused`).
* Forward and backward are compiled where that pays (:mod:`engine.gpu.compiled`), and recorded: a step is
  two launches (:mod:`engine.gpu.recorded`). The first step runs plainly, the second is recorded.
* With several ranks a linear's gradient says when it is there (:mod:`engine.quant.announced`), and travels to
  the others while the backward pass is at the linears before it.
* The next batch travels to the GPU while this one is computed (:mod:`engine.data.prefetch`).

A batch of another size (the last one of an epoch) runs plainly in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.gpu.recorded import Graphed
from engine.methods.blockwise.fused import FusedStepper
from engine.methods.blockwise.reconstruction import Reconstruction, Streams, reconstruction_loss
from engine.quant.announced import Announcements
from engine.training.loop import Settings
from engine.training.stepper import Stepper

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

Result = tuple[Tensor, tuple[Tensor, ...]]
"""Loss and gradients of a micro-batch."""


class FastReconstruction(Reconstruction):
    """Needs a device on which Triton works. ``on_failure`` is told why steps cannot be recorded, if that is
    so."""

    def __init__(
        self,
        lm: CausalLM,
        index: int,
        block: nn.Module,
        streams: Streams,
        config: BlockAPConfig,
        grid: GridConfig,
        dtype: torch.dtype,
        *,
        ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        on_failure: Callable[[str], None],
    ) -> None:
        super().__init__(lm, index, block, streams, config, grid, dtype, ranges=ranges)
        self.on_failure = on_failure
        for linear in self.linears.values():
            linear.keep_quantized(dtype)

    def stepper(self, settings: Settings) -> Stepper:
        quantized = any(set(self.config.train) & {"weights", "scales", "zero_points"})
        announcing = list(self.linears.values()) if quantized and settings.world.several else []
        self._announcements = Announcements(len(announcing), settings.device)
        self._announcements.listen()
        for number, linear in enumerate(announcing):
            linear.announce(self._announcements.tokens[number], number)
        self._stepper = FusedStepper(
            self.groups,
            self.linears.values(),
            weight_decay=settings.weight_decay,
            device=settings.device,
            dtype=settings.dtype,
            on_failure=self.on_failure,
            betas=settings.betas,
            world=settings.world,
            announcements=self._announcements if announcing else None,
        )
        self._stepper.requantize()
        weights = [weight for linear in self.linears.values() if (weight := linear.quantized) is not None]
        for weight in weights:
            weight.requires_grad_(quantized)
        self._leaves = [*(weights if quantized else ()), *self._stepper.others]
        self._share = min(settings.batch_size, self.streams.train) // settings.world.size
        self._begin(settings.micro_batch)
        return self._stepper

    def refresh(self) -> None:
        self._stepper.requantize()

    def project(self) -> None:
        """The kernels have done it."""

    def upcoming(self, rows: Tensor) -> None:
        if len(rows) == self._usual[0]:
            super().upcoming(rows)

    def memory_is_short(self, micro_batch: int) -> None:
        self._begin(micro_batch)

    def close(self) -> None:
        super().close()
        self._stepper.drop_gradients()
        self._graph.forget()
        self._inputs.clear()
        self._sums.clear()
        self._announcements.close()
        for linear in self.linears.values():
            linear.quantized = None

    def _begin(self, micro_batch: int) -> None:
        """Fixed places for the inputs of the usual micro-batch; what was recorded is void."""
        count = min(micro_batch, self._share)
        self._usual = count, count / self._share
        """Sequences, and their weight in the batch."""
        self._ran = False
        stores = (self.streams.quantized, self.streams.full)
        self._inputs = [
            torch.empty((count, *store.shape[1:]), dtype=store.dtype, device=self.lm.device)
            for store in stores
        ]
        self._graph: Graphed[Result] = Graphed(self._forward_backward, self.lm.device, self.on_failure)
        self._sums: list[Tensor] = []
        """Gradients of the micro-batches so far, float32; empty where a batch passes at once."""

    # Micro-batches

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        stepper = self._stepper
        if weight < 1 and not self._sums:
            self._sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in self._leaves]
            stepper.sums_up = True
        if (len(rows), weight) != self._usual:
            return self._unusual(rows, weight)
        self.prefetch.read_into(self.places(rows), self._inputs)
        loss, gradients = self._graph() if self._ran else self._forward_backward()
        stepper.gradients = self._sums or gradients
        stepper.as_announced = not self._sums and self._announcements.hold_for(gradients)
        stepper.fixed = self._ran and (self._graph.recorded or bool(self._sums))
        self._ran = True
        return loss

    def _forward_backward(self) -> Result:
        return self._differentiate(self._inputs, self._usual[1], self.train_loss)

    def _unusual(self, rows: Tensor, weight: float) -> Tensor:
        """A batch of another size: plainly, its gradients to where the others' would be."""
        loss, gradients = self._differentiate(
            self.prefetch.read(self.places(rows)), weight, reconstruction_loss
        )
        self._stepper.as_announced = False
        if self._sums:
            self._stepper.gradients = self._sums
        elif self._graph.recorded:
            torch._foreach_copy_(list(self._stepper.gradients), list(gradients))
        else:
            self._stepper.gradients = gradients
        return loss

    def _differentiate(
        self, tensors: Sequence[Tensor], weight: float, function: Callable[..., Tensor]
    ) -> Result:
        with torch.enable_grad():
            loss = self.training_loss(tensors, function) * weight
            wanted = [*self._leaves, *self._announcements.tokens]
            gradients = torch.autograd.grad(self._stepper.scale(loss), wanted)[: len(self._leaves)]
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        if self._sums:
            torch._foreach_add_(self._sums, list(gradients))
            gradients = ()
        return loss.detach(), gradients
