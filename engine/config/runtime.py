"""Where and how a run is carried out."""

from __future__ import annotations

from typing import Literal

from engine.config import checks
from engine.config.base import Section
from engine.errors import UsageError

LARGEST_SEED = 2**63 - 1  # what TOML and torch.manual_seed both hold

MOST_GPUS = 64
"""Of one machine; a larger number is a mistake in typing."""

StoreKind = Literal["device", "host", "disk"]
"""Where activations can live between two blocks (:mod:`engine.data.activations`)."""


GPUS = "runtime.gpus"
"""The field that says how many GPUs add up their gradients: it decides, and another number may be allowed."""


class RuntimeConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how it runs. Nothing here is part of what is computed, except ``seed``."""

    device: str = "auto"
    """The run computes on ``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    gpus: int = 1
    """So many GPUs of this machine compute together, each with its share of every batch (on the CPU: so many
    processes)."""
    seed: int = 0
    """The seed decides which text is drawn and in which order it is seen."""
    threads: int = 0
    """The CPU computes with this many threads; 0 takes every core that this process may use, beside a GPU at
    most 16."""
    activation_store: Literal["auto", StoreKind] = "auto"
    """The two activation streams live here; auto takes the fastest place that has room."""
    host_memory_gib: float = 0.0
    """The run may take this many GiB of host memory; 0 takes what is free now, less a reserve."""
    deterministic: bool = False
    """A GPU runs bitwise reproducible kernels, which are slower; the CPU always does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Block-AP's steps are compiled on a GPU (torch.compile); auto does it where that saves more than its
    half minute."""
    checkpoint_minutes: float = 5.0
    """A kill loses at most this many minutes of training; 0 checkpoints between blocks only."""
    checkpoint_share: float = 0.02
    """Checkpoints take at most this part of the time, even where ``checkpoint_minutes`` asks for more."""
    streams: Literal["auto", "stored", "recomputed"] = "auto"
    """A resumed run gets its activations back this way; auto stores them where that costs little time and
    disk."""

    def check(self, name: str) -> None:
        checks.device(f"{name}.device", self.device)
        checks.count(f"{name}.gpus", self.gpus, most=MOST_GPUS)
        if self.gpus > 1 and ":" in self.device:
            raise UsageError(
                f"{self.device} is one GPU, and {name}.gpus = {self.gpus}",
                where=f"{name}.device",
                hint="leave it at auto; CUDA_VISIBLE_DEVICES says which GPUs are taken",
            )
        if self.gpus > 1 and self.streams == "stored":
            raise UsageError(
                "a run on several GPUs computes its activations again after a restart",
                where=f"{name}.streams",
                hint=f"{name}.streams = auto",
            )
        checks.count(f"{name}.seed", self.seed, least=0, most=LARGEST_SEED)
        checks.count(f"{name}.threads", self.threads, least=0, most=4096)
        checks.not_negative(f"{name}.host_memory_gib", self.host_memory_gib, hint="0 takes what is free")
        # At most a year: 0 is how to have none.
        checks.between(f"{name}.checkpoint_minutes", self.checkpoint_minutes, 0.0, 525_600.0)
        checks.between(f"{name}.checkpoint_share", self.checkpoint_share, 0.0001, 1.0)

    @classmethod
    def decides(cls, field: str) -> bool:
        return field in ("seed", "deterministic", "gpus")

    @classmethod
    def silent(cls) -> tuple[str, ...]:
        return ("gpus",)
