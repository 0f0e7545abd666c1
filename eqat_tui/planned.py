"""The plan that a log holds, as far as it is one.

A plan is written as free JSON, by whichever version made the run, and a damaged or a forged log may hold
anything in its place. So it is read by its shape: what is missing or of another type is empty, and everything
that shows a plan can rely on every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eqat_tui.output import LONGEST_LINE, number

MOST = 100
"""Entries of a list; no plan has as many phases or problems."""


class Numbers:
    """Stands for a table of any names with numbers."""


SHAPE: Mapping[str, Any] = {
    "model": "",
    "model_type": "",
    "parameters": None,
    "blocks": None,
    "device": "",
    "together": "",
    "phases": [{"name": "", "peak_gpu_bytes": None, "peak_host_bytes": None, "seconds": None}],
    "peak_gpu_bytes": None,
    "peak_host_bytes": None,
    "disk_bytes": None,
    "export_bytes": None,
    "export_sizes": Numbers,
    "fp_bytes": None,
    "bits_per_weight": None,
    "zero_points": "",
    "head": "",
    "calibration": "",
    "begin": "",
    "activation_store": "",
    "activation_store_reason": "",
    "micro_batches": Numbers,
    "recovery": {
        "interval_seconds": None,
        "snapshots": Numbers,
        "lost_seconds": None,
        "checkpoint_bytes": None,
        "checkpoint_seconds": None,
        "share": None,
        "streams": "",
        "streams_every": None,
        "streams_reason": "",
        "restart_seconds": None,
    },
    "seconds": None,
    "time_basis": "",
    "warnings": [""],
    "problems": [{"where": "", "message": "", "hint": ""}],
    "machine": {"gpu_name": "", "gpu_free": None, "host_free": None, "disk_free": None, "cpus": None},
}
"""A text, a number (``None``), a list of things of one shape, or a table."""

PUBLISHED: Mapping[str, Any] = {
    "model": "",
    "setting": "",
    "perplexity": None,
    "fp_perplexity": None,
    "accuracy": None,
    "fp_accuracy": None,
    "conditions": "",
}


def known(plan: Any) -> dict[str, Any]:
    """``plan`` with every key of ``SHAPE`` and ``published``; what is no number, or negative, is ``None``."""
    published = branch(plan, "published")
    found: dict[str, Any] = _shaped(plan, SHAPE)
    return {**found, "published": _shaped(published, PUBLISHED) if isinstance(published, Mapping) else None}


def _shaped(value: Any, shape: Any) -> Any:
    if isinstance(shape, str):
        return value[:LONGEST_LINE] if isinstance(value, str) else shape
    if isinstance(shape, list):
        return [_shaped(one, shape[0]) for one in value[:MOST]] if isinstance(value, list | tuple) else []
    if shape is None:
        found = number(value)
        return value if found is not None and found >= 0 else None
    table = value if isinstance(value, Mapping) else {}
    if shape is Numbers:
        return {str(name): _shaped(table[name], None) for name in list(table)[:MOST]}
    return {name: _shaped(table.get(name), inner) for name, inner in shape.items()}


def branch(tree: Any, *names: str) -> Any:
    """What lies in a tree under these names, or none: a configuration that this version did not write."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
