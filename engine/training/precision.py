"""16-bit arithmetic: where it is used, and the loss scale without which float16's gradients vanish."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000
"""Good steps after which float16's loss scale is doubled."""


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for 16-bit compute; a no-op context at float32."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


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
