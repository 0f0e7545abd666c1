"""What the EfficientQAT paper reports, to hold a plan or a result against (arXiv 2407.11062, tables 1 and 2).

WikiText-2 perplexity at context 2048, and the mean zero-shot accuracy of WinoGrande, PIQA, HellaSwag,
ARC-easy and ARC-challenge (``acc``, lm-eval 0.4.2), after Block-AP and E2E-QP with the paper's recipe.
"""

from __future__ import annotations

import msgspec

from engine.architecture.families import Architecture
from engine.config.grid import GridConfig


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A published result for one model at one setting."""

    model: str
    setting: str
    perplexity: float
    accuracy: float
    fp_perplexity: float
    fp_accuracy: float
    block_ap_perplexity: float | None = None
    """After Block-AP alone, where published."""
    conditions: str = "EfficientQAT, arXiv 2407.11062: WikiText-2 at context 2048; mean accuracy of 5 tasks"


MODELS: dict[tuple[int, int, int, int], str] = {
    # blocks, hidden, vocabulary, positions
    (32, 4096, 32000, 4096): "Llama-2-7B",
    (40, 5120, 32000, 4096): "Llama-2-13B",
    (80, 8192, 32000, 4096): "Llama-2-70B",
    (32, 4096, 128256, 8192): "Llama-3-8B",
    (80, 8192, 128256, 8192): "Llama-3-70B",
}
"""Sizes tell the models apart: Llama 1 has half the positions of Llama 2, Llama 3.1 16 times those of 3."""

FULL_PRECISION = "fp16"
FIGURES: dict[str, dict[str, tuple[float, float]]] = {
    "Llama-2-7B": {
        FULL_PRECISION: (5.47, 64.86),
        "w4g128": (5.53, 64.27),
        "w3g128": (5.81, 64.02),
        "w2g128": (7.19, 59.50),
        "w2g64": (6.86, 60.14),
    },
    "Llama-2-13B": {
        FULL_PRECISION: (4.88, 67.81),
        "w4g128": (4.93, 67.52),
        "w3g128": (5.12, 67.28),
        "w2g128": (6.08, 63.88),
        "w2g64": (5.96, 64.48),
    },
    "Llama-2-70B": {
        FULL_PRECISION: (3.32, 72.41),
        "w4g128": (3.39, 72.62),
        "w3g128": (3.61, 71.76),
        "w2g128": (4.61, 68.93),
        "w2g64": (4.52, 69.48),
    },
    "Llama-3-8B": {
        FULL_PRECISION: (6.14, 68.58),
        "w4g128": (6.47, 68.43),
        "w3g128": (7.09, 67.35),
        "w2g128": (9.80, 59.37),
        "w2g64": (9.41, 60.76),
    },
    "Llama-3-70B": {
        FULL_PRECISION: (2.85, 75.33),
        "w4g128": (3.17, 74.57),
        "w3g128": (4.19, 72.42),
        "w2g128": (6.38, 67.57),
        "w2g64": (6.07, 67.89),
    },
}
BLOCK_AP_ONLY = {"w2g64": 7.65, "w2g128": 7.94, "w3g128": 5.89, "w4g128": 5.56}
"""Llama-2-7B."""


def published(source: str, architecture: Architecture, grid: GridConfig) -> Published | None:
    """The paper's result for this model and grid; none when it reports nothing comparable."""
    key = (architecture.blocks, architecture.hidden, architecture.vocab, architecture.max_positions)
    model = MODELS.get(key)
    tuned = any(word in source.lower() for word in ("chat", "instruct"))
    other_grid = grid.fixes_zero_points or grid.head_bits
    if model is None or architecture.model_type != "llama" or tuned or other_grid:
        return None
    setting = f"w{grid.bits}g{grid.group_size}"
    if setting not in FIGURES[model]:
        return None
    (perplexity, accuracy), (fp_perplexity, fp_accuracy) = (
        FIGURES[model][setting],
        FIGURES[model][FULL_PRECISION],
    )
    return Published(
        model=model,
        setting=setting,
        perplexity=perplexity,
        accuracy=accuracy,
        fp_perplexity=fp_perplexity,
        fp_accuracy=fp_accuracy,
        block_ap_perplexity=BLOCK_AP_ONLY.get(setting) if model == "Llama-2-7B" else None,
    )
