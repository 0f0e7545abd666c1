"""What an export is told about, to whoever asked for it and in its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    path: Path
    format: str
    bytes: int
    """Size of the safetensors files."""
    fp_bytes: int
    """Size of the same model with every parameter at 16 bits."""
    bits_per_weight: float
    """Integers, scales and zero points of the quantized linears, in bits per weight."""
    files: tuple[str, ...]
    """Safetensors files, in order."""
    blocks_name: str
    """Where the decoder blocks are, as ``model.layers``."""
    dropped_code: tuple[str, ...] = ()
    """Names of code in the model's own JSON files that were left out, because the code is not there."""
    dtype: str = "float16"
    """What everything that is not quantized is stored in, and what config.json declares."""
