"""What GPUs tell each other over, and how fast that is.

NVML says of every two GPUs of a run whether NVLink is between them (:mod:`engine.plan.machine`). Where it
does not, the name of the board does: the same processor is sold on boards with NVLink (SXM, NVL) and without
(PCIe).
"""

from __future__ import annotations

import re
from typing import Literal

from engine.plan.machine import Machine

Link = Literal["NVLink", "PCIe", ""]
"""None between processes on the CPU."""
LINKED_BOARDS = ("SXM", "SXM2", "SXM3", "SXM4", "SXM5", "SXM6", "NVL")
UNLINKED_BOARDS = ("PCIE", "RTX", "MIG")
"""Parts of one GPU (MIG) have no way to each other but through the host."""
LINKED_UNLESS_SAID = ("H100", "H200", "H20", "H800", "B200", "B300", "GH200", "GB200", "GB300")
"""Their names say nothing of a board with NVLink ("NVIDIA H100 80GB HBM3"), and call the other one PCIe."""
BYTES_A_SECOND: dict[Link, float] = {"NVLink": 355e9, "PCIe": 28e9, "": 1e9}
"""At which tensors are added up. NVLink: as measured by an all-reduce of 1 GiB on four H100s.

PCIe: what makes the step of Block-AP on a 7B block, batch 8, as long as it was measured on H200s that spoke
through host memory (NCCL_P2P_DISABLE=1; "Several GPUs" in benchmarks/README.md): 28.1e9 for 24.6 ms on two of
them, 27.6e9 for 20.96 ms on four. The generation of PCIe before has half on paper, and was not measured.

Between processes on the CPU: reckoned, not measured."""


def linked_by_name(gpu_name: str) -> bool:
    """Whether a GPU of this name has NVLink; whole words are read, for an RTX A1000 is no A100."""
    words = re.findall(r"[A-Z0-9]+", gpu_name.upper())
    if any(word in UNLINKED_BOARDS for word in words):
        return False
    return any(word in LINKED_BOARDS or word in LINKED_UNLESS_SAID for word in words)


def link_of(machine: Machine, *, cuda: bool) -> Link:
    """Between the GPUs of a run on this machine."""
    if not cuda:
        return ""
    linked = linked_by_name(machine.gpu_name or "") if machine.nvlink is None else machine.nvlink
    return "NVLink" if linked else "PCIe"
