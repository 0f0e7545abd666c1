"""The table of export formats: one row a layout of packed checkpoints."""

from __future__ import annotations

import msgspec

from engine.config.grid import BITS, GROUP_SIZES
from engine.config.tables import Table


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A layout of a packed checkpoint, and what it can hold."""

    name: str
    """What ``export.formats`` calls it; also its folder in ``export/``."""
    label: str
    """In words."""
    bits: tuple[int, ...] = BITS
    """Bits a weight that it can hold."""
    group_sizes: tuple[int, ...] = GROUP_SIZES
    """Group sizes that it can hold; -1 is the whole row."""
    symmetric: tuple[bool, ...] = (False, True)
    """Whether it holds asymmetric and symmetric grids."""
    code: str
    """``module:attribute`` of the heavy half: the :class:`~engine.export.checkpoint.Layout`."""
    loading: str
    """Python lines that load an export whose folder is ``path``."""
    costs: str = ""
    """``module:function``: bytes of one linear of so many outputs, inputs, bits and group size."""
    words_along_outputs: bool = False
    """Outputs, too, are packed in whole 32-bit words."""


FORMATS = Table(
    "format",
    Format(
        name="gptq_v2",
        label="GPTQ v2",
        code="engine.export.gptq_v2:GPTQv2",
        costs="engine.plan.export_sizes:gptq_bytes",
        words_along_outputs=True,
        loading=(
            "from transformers import AutoModelForCausalLM\n"
            'model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")  # pip install gptqmodel\n'
        ),
    ),
)
