"""The whole configuration of a run, and how an extension adds a section of its own to it."""

from __future__ import annotations

import functools

import msgspec

from engine.config.base import Section, field_types
from engine.config.block_ap import BlockAPConfig
from engine.config.calibration import CalibrationConfig
from engine.config.e2e_qat import E2EQATConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.export import ExportConfig
from engine.config.gptq import GPTQConfig
from engine.config.grid import GridConfig
from engine.config.imported import ImportedConfig
from engine.config.instructions import InstructionsConfig
from engine.config.lr_qat import LRQATConfig
from engine.config.model import ModelConfig
from engine.config.runtime import RuntimeConfig
from engine.config.tables import is_name

LABELS = ("name", "description")
"""Fields that say what a run is called, and are no part of what is computed."""
SWEEP = "sweep"
"""The table of a file that says what a sweep of it varies (:mod:`engine.config.sweeps`)."""
CASE = "case"
"""In that table, what differs in several fields at once."""


class RunConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run, completely."""

    name: str = "custom"
    """The run started from this preset or file; a label, no part of what is computed."""
    description: str = ""
    """A sentence says what the preset or file is for; a label too."""
    model: ModelConfig = ModelConfig()
    grid: GridConfig = GridConfig()
    data: CalibrationConfig = CalibrationConfig()
    imported: ImportedConfig = ImportedConfig()
    block_ap: BlockAPConfig = BlockAPConfig()
    gptq: GPTQConfig = GPTQConfig()
    e2e_qp: E2EQPConfig = E2EQPConfig()
    e2e_qat: E2EQATConfig = E2EQATConfig()
    lr_qat: LRQATConfig = LRQATConfig()
    instructions: InstructionsConfig = InstructionsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("imported", *YOUNGER)


YOUNGER = ("gptq", "e2e_qat", "lr_qat", "instructions")
"""Sections of ours that earlier versions did not have: a run that does not use one is the run that it was."""

_registered: dict[str, type[Section]] = {}


def register_section(name: str, kind: type[Section]) -> None:
    """Make ``kind`` the section ``name`` of every configuration that is made from now on.

    A configuration that does not name the section has its default, which must not ask for anything: that an
    extension is there changes no run, no hash and no file.

    Raises:
        ValueError: for a name that is taken or is no plain word in lower case, and for a section that is
            enabled by default.
    """
    if not is_name(name) or name in (SWEEP, CASE):
        raise ValueError(f"{name!r} is no name for a section")
    if name in field_types(run_config()):
        raise ValueError(f"there is a section {name!r} already")
    if getattr(kind(), "enabled", False):
        raise ValueError(
            f"the section {name!r} is enabled by default, and an extension's has to be asked for"
        )
    _registered[name] = kind
    run_config.cache_clear()


def unregister_section(name: str) -> None:
    """Take a section out again, which only tests want."""
    del _registered[name]
    run_config.cache_clear()


@functools.cache
def run_config() -> type[RunConfig]:
    """The type of a configuration: :class:`RunConfig`, with the sections of extensions after its own."""
    if not _registered:
        return RunConfig
    sections = [(name, kind, msgspec.field(default_factory=kind)) for name, kind in _registered.items()]
    made = msgspec.defstruct(
        "RunConfig",
        sections,
        bases=(RunConfig,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
        module=__name__,
    )
    assert issubclass(made, RunConfig)
    return made


def silent_sections(config: RunConfig) -> tuple[str, ...]:
    """Sections of extensions, and younger ones of ours, that say nothing but their default.

    They are left out of files, hashes and identities, so that a run is the same with and without an extension
    that it does not use, and the same as an earlier version made it.
    """
    kinds = {name: type(getattr(RunConfig(), name)) for name in YOUNGER} | _registered
    return tuple(name for name, kind in kinds.items() if getattr(config, name, None) == kind())
