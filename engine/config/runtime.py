"""Where and how a run is carried out."""

from __future__ import annotations

from typing import Literal

from engine.config.base import Section

StoreKind = Literal["device", "host", "disk"]
"""Where activations can live between two blocks (:mod:`engine.data.activations`)."""


class RuntimeConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how it runs. Nothing here is part of what is computed, except ``seed``."""

    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    seed: int = 0
    """Decides which text is drawn and in which order it is seen."""
    threads: int = 0
    """CPU threads; 0 takes every core this process may use."""
    activation_store: Literal["auto", StoreKind] = "auto"
    """Where the two activation streams live; auto: the fastest place that has room."""
    host_memory_gib: float = 0.0
    """Budget of host memory, GiB; 0: what is free now, less a reserve."""
    deterministic: bool = False
    """Bitwise reproducible kernels on a GPU, slower; the CPU always is."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile Block-AP's steps on a GPU (torch.compile); auto: where that saves more than its half minute."""
    checkpoint_minutes: float = 5.0
    """A kill loses at most this much training; 0 checkpoints between blocks only."""
    checkpoint_share: float = 0.02
    """Largest part of the time that may go into checkpoints; where the two disagree, this one wins."""
    streams: Literal["auto", "stored", "recomputed"] = "auto"
    """How a resumed run gets its activations back; auto: stored where that costs little time and disk."""
