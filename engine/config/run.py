"""The whole configuration of a run."""

from __future__ import annotations

from engine.config.base import Section
from engine.config.block_ap import BlockAPConfig
from engine.config.data import DataConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.export import ExportConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.config.runtime import RuntimeConfig


class RunConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run, completely."""

    name: str = "custom"
    """Preset or file the run started from; a label, no part of what is computed."""
    description: str = ""
    model: ModelConfig = ModelConfig()
    grid: GridConfig = GridConfig()
    data: DataConfig = DataConfig()
    block_ap: BlockAPConfig = BlockAPConfig()
    e2e_qp: E2EQPConfig = E2EQPConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    runtime: RuntimeConfig = RuntimeConfig()


def run_config() -> type[RunConfig]:
    """The type of a whole configuration, with the sections that extensions brought."""
    return RunConfig
