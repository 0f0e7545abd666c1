"""The plan: what a run will need and whether it fits, before anything is loaded.

    model header -> sizes -> memory of each phase, disk, time
    machine      -> where the activation streams live, what does not fit and what would

Everything is computed from config.json or file headers in well under a second. Unsupported models raise
at once (``refusals.py``); what does not fit is listed in :attr:`Plan.problems`, each in one sentence with
a setting that would fit, so that ``eqat plan`` can show the whole picture. :func:`check` turns the first
of them into the error a run ends with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.run.architecture import ModelDescription, describe, refuse
from engine.run.config import DataConfig, RunConfig
from engine.run.errors import DataError, PreflightError
from engine.run.estimate import CONSTANTS, GIB, Store, Workload, sizes
from engine.run.families import Architecture
from engine.run.machine import Machine, detect
from engine.run.memory_model import disk_bytes, host_memory, phase_memory
from engine.run.published import Published, published
from engine.run.time_model import phase_seconds, speed

__all__ = ["Machine", "PhasePlan", "Plan", "check", "make_plan"]

GPU_RESERVE = 0.10
"""Part of the free GPU memory that the choice of the activation store leaves alone."""
HOST_RESERVE = 0.10
"""Part of the free host memory that a run leaves to others, unless a budget is given."""


class PhasePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of the run."""

    name: str
    peak_gpu_bytes: int | None
    """Peak of torch's allocator; none on the CPU."""
    peak_host_bytes: int
    seconds: float
    parts: dict[str, int]
    """What the peak consists of, without the process itself; bytes."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not fit."""

    where: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} ({self.hint})"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is expected to need. Sizes are bytes, times seconds; all of them are estimates."""

    model: str
    model_type: str
    parameters: int
    blocks: int
    exact: bool
    """Sizes are exact; otherwise they are those of a Llama with the same fields."""
    device: str
    """``cuda`` or ``cpu``."""
    phases: tuple[PhasePlan, ...]
    peak_gpu_bytes: int | None
    peak_host_bytes: int
    disk_bytes: int
    export_bytes: int
    fp_bytes: int
    bits_per_weight: float
    activation_store: Store
    activation_store_reason: str
    stream_bytes: int
    """One of Block-AP's two activation streams."""
    evaluation_windows: int
    seconds: float
    time_basis: str
    published: Published | None
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Plain values for events and ``--json``."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result


TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow", ".gz", ".zst")


def make_plan(
    config: RunConfig,
    *,
    machine: Machine | None = None,
    device: str | None = None,
    runs_dir: Path | None = None,
) -> Plan:
    """Plan a run on this machine, or on the one described.

    ``device`` (``cpu`` or ``cuda``) overrides ``runtime.device`` for a caller that knows what torch can use.

    Raises:
        PreflightError: for a model that is missing or cannot be quantized in this way.
        DataError: for a local text file or folder that is not there.
    """
    _check_local_text(config)
    model = describe(config.model.source, config.model.revision)
    refuse(model.architecture, model.config, config.grid, config.export.formats)
    machine = machine or detect(runs_dir, device or config.runtime.device)
    wanted = device or config.runtime.device
    cuda = wanted.startswith("cuda") or (wanted == "auto" and machine.gpu_name is not None)
    windows, unknown_text = evaluation_windows(config, model.architecture)
    work = Workload(arch=model.architecture, config=config, cuda=cuda, windows=windows)
    store, reason = choose_store(work, machine)

    rates = speed(cuda, machine.gpu_name or "", config.runtime.threads or machine.cpus, machine.avx512)
    read = model.stored_bytes or work.arch.params * work.arch.dtype_bytes
    phases = tuple(
        _phase(work, name, store, phase_seconds(work, name, rates, read)) for name in work.phases()
    )
    size = sizes(work.arch, config.grid)
    return Plan(
        model=config.model.source,
        model_type=work.arch.model_type,
        parameters=work.arch.params,
        blocks=work.arch.blocks,
        exact=work.arch.exact,
        device="cuda" if cuda else "cpu",
        phases=phases,
        peak_gpu_bytes=max(phase.peak_gpu_bytes or 0 for phase in phases) if cuda else None,
        peak_host_bytes=max(phase.peak_host_bytes for phase in phases),
        disk_bytes=disk_bytes(work, store),
        export_bytes=size.export * len(config.export.formats) or size.export,
        fp_bytes=size.fp,
        bits_per_weight=size.bits_per_weight,
        activation_store=store,
        activation_store_reason=reason,
        stream_bytes=work.stream_bytes(),
        evaluation_windows=windows,
        seconds=sum(phase.seconds for phase in phases),
        time_basis=f"estimate: operations and memory traffic counted, at {rates.basis}",
        published=published(config.model.source, work.arch, config.grid),
        warnings=tuple(_warnings(work, model, unknown_text)),
        problems=tuple(_problems(work, store, machine)),
        machine=machine,
    )


def _check_local_text(config: RunConfig) -> None:
    """A mistyped path should not cost a run; what is in the files is for the engine to judge."""
    used = [("data.source", config.data, config.block_ap.enabled or config.e2e_qp.enabled)]
    used.append(("evaluation.data.source", config.evaluation.data, config.evaluation.enabled))
    for name, data, wanted in used:
        path = Path(data.source).expanduser()
        if not wanted or not (data.source.startswith(("/", ".", "~")) or path.suffix in TEXT_SUFFIXES):
            continue
        if not path.exists():
            raise DataError("no such file or folder", where=data.source, hint=f"check {name}")
        if path.is_file() and path.stat().st_size == 0:
            raise DataError("the file is empty", where=data.source, hint=f"check {name}")


def check(plan: Plan) -> None:
    """Raise PreflightError for the first thing that does not fit."""
    if plan.problems:
        problem = plan.problems[0]
        raise PreflightError(problem.message, where=problem.where, hint=problem.hint)


def _phase(work: Workload, name: str, store: Store, seconds: float) -> PhasePlan:
    memory = phase_memory(work, name)
    parts = dict(memory.device)
    if memory.stored and store != "disk":
        parts[f"activation store ({store})"] = memory.stored
    return PhasePlan(
        name=name,
        peak_gpu_bytes=memory.gpu(store) if work.cuda else None,
        peak_host_bytes=host_memory(work, memory, store),
        seconds=seconds,
        parts=parts,
    )


# ----------------------------------------------------------------------------------- activation store


def choose_store(work: Workload, machine: Machine) -> tuple[Store, str]:
    """The fastest place with room for the activation streams, and why."""
    wanted = work.config.runtime.activation_store
    if wanted != "auto":
        return wanted, "set by runtime.activation_store"
    size = _text(max(phase_memory(work, phase).stored for phase in work.phases()))
    if work.cuda:
        room = (machine.gpu_free - CONSTANTS.cuda_context) * (1 - GPU_RESERVE)
        if peak_gpu(work, "device") <= room:
            return "device", f"{size} of activations fit into GPU memory beside the training"
    if peak_host(work, "host") <= host_budget(work.config, machine):
        return "host", f"{size} of activations fit into host memory"
    return "disk", f"{size} of activations fit neither into GPU nor into host memory"


def peak_gpu(work: Workload, store: Store) -> int:
    return max(phase_memory(work, phase).gpu(store) for phase in work.phases())


def peak_host(work: Workload, store: Store) -> int:
    return max(host_memory(work, phase_memory(work, phase), store) for phase in work.phases())


def host_budget(config: RunConfig, machine: Machine) -> int:
    """Host memory that the run may use."""
    if config.runtime.host_memory_gib:
        return int(config.runtime.host_memory_gib * GIB)
    return int(machine.host_free * (1 - HOST_RESERVE))


# ------------------------------------------------------------------------------------------- problems


def _problems(work: Workload, store: Store, machine: Machine) -> Iterator[Problem]:
    """What does not fit, each with a setting that would."""
    if work.cuda and machine.gpu_name is None:
        yield Problem(
            where="runtime.device", message="no usable NVIDIA GPU was found", hint="use --device cpu"
        )
        return
    gpu, host, disk = _limits(work, machine)
    if work.cuda and peak_gpu(work, store) > gpu:
        phase = max(work.phases(), key=lambda name: phase_memory(work, name).gpu(store))
        yield Problem(
            where=phase,
            message=f"{_text(peak_gpu(work, store))} of GPU memory are needed and {_text(gpu)} are free "
            f"on this {machine.gpu_name}",
            hint=_remedy(work, store, machine) or "use a GPU with more memory, or --device cpu",
        )
    if peak_host(work, store) > host:
        phase = max(work.phases(), key=lambda name: host_memory(work, phase_memory(work, name), store))
        stated = "the budget is" if work.config.runtime.host_memory_gib else "what may be used is"
        yield Problem(
            where=phase,
            message=f"{_text(peak_host(work, store))} of host memory are needed and {stated} {_text(host)}",
            hint=_remedy(work, store, machine) or "use a machine with more memory",
        )
    if disk_bytes(work, store) > disk:
        yield Problem(
            where="disk",
            message=f"the run needs {_text(disk_bytes(work, store))} of disk and {_text(disk)} are free",
            hint=_remedy(work, store, machine) or "free some space or use --runs-dir on another disk",
        )


def _limits(work: Workload, machine: Machine) -> tuple[int, int, int]:
    """What may be used of GPU memory, host memory and disk."""
    gpu = max(0, machine.gpu_free - CONSTANTS.cuda_context)
    return gpu, host_budget(work.config, machine), machine.disk_free


def _remedy(work: Workload, store: Store, machine: Machine) -> str:
    """The least painful change after which everything fits; empty when there is none."""
    gpu, host, disk = _limits(work, machine)
    for text, other, kept in _changes(work, store):
        fits_gpu = not work.cuda or peak_gpu(other, kept) <= gpu
        if fits_gpu and peak_host(other, kept) <= host and disk_bytes(other, kept) <= disk:
            return f"{text} would fit"
    return ""


def _changes(work: Workload, store: Store) -> Iterator[tuple[str, Workload, Store]]:
    """Ever smaller variants of the run, the least painful first: (what to set, workload, store)."""
    slower: dict[Store, tuple[Store, ...]] = {
        "device": ("host", "disk"),
        "host": ("disk",),
        "disk": ("host",),
    }
    for kept in slower[store]:
        yield f"runtime.activation_store = {kept}", work, kept
    for text, config in _smaller(work.config):
        smaller = msgspec.structs.replace(work, config=config)
        yield text, smaller, store
        if store != "disk":
            yield f"{text} with runtime.activation_store = disk", smaller, "disk"


def _smaller(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Configurations that need less: each change alone first, then all of them adding up."""
    for section, field, values in _ladders(config):
        for value in values:
            yield f"{section}.{field} = {str(value).lower()}", _change(config, section, field, value)
    said: dict[str, str] = {}
    for section, field, values in _ladders(config):
        for value in values:
            config = _change(config, section, field, value)
            said[f"{section}.{field}"] = str(value).lower()
            yield ", ".join(f"{name} = {value}" for name, value in said.items()), config


def _change(config: RunConfig, section: str, field: str, value: Any) -> RunConfig:
    part = msgspec.structs.replace(getattr(config, section), **{field: value})
    return msgspec.structs.replace(config, **{section: part})


def _ladders(config: RunConfig) -> list[tuple[str, str, list[Any]]]:
    """Settings that can be lowered and the values to try, the least painful first."""

    def halves(value: int, lowest: int) -> list[Any]:
        values = []
        while value > lowest:
            value //= 2
            values.append(value)
        return values

    block_ap, e2e_qp, evaluation = config.block_ap, config.e2e_qp, config.evaluation
    recompute = [True] if not e2e_qp.activation_checkpointing else []
    ladders: list[tuple[str, str, list[Any]]] = [
        ("evaluation", "batch_size", [1] if evaluation.batch_size > 1 else []),
        ("e2e_qp", "micro_batch_size", [1] if e2e_qp.micro_batch_size > 1 else []),
        ("e2e_qp", "activation_checkpointing", recompute),
        ("block_ap", "batch_size", halves(block_ap.batch_size, 1)),
        ("block_ap", "sequences", halves(block_ap.sequences, 128)),
        ("e2e_qp", "sequences", halves(e2e_qp.sequences, 128)),
        ("block_ap", "sequence_length", halves(block_ap.sequence_length, 256)),
        ("e2e_qp", "sequence_length", halves(e2e_qp.sequence_length, 256)),
        ("evaluation", "sequence_length", halves(evaluation.sequence_length, 256)),
    ]
    return [ladder for ladder in ladders if getattr(config, ladder[0]).enabled]


# ------------------------------------------------------------------------------------------- warnings


def _warnings(work: Workload, model: ModelDescription, unknown_text: bool) -> Iterator[str]:
    config, arch = work.config, work.arch
    trained = config.block_ap.enabled or config.e2e_qp.enabled
    if trained and config.evaluation.enabled and corpus(config.data) == corpus(config.evaluation.data):
        yield (
            f"calibration and evaluation both use {corpus(config.data)}: the result will look better than "
            "on other text; evaluate on another corpus to compare models"
        )
    if model.kind == "gguf" and model.stored_bytes and model.stored_bytes < 1.5 * arch.params:
        yield (
            "the GGUF file holds quantized weights already: full precision here means as good as this file"
        )
    if not arch.exact:
        yield f"sizes of model type {arch.model_type!r} are estimated as if it were a Llama"
    if model.kind == "config":
        yield "no weight files were found beside config.json: planned from config.json alone"
    for name in ("block_ap", "e2e_qp", "evaluation"):
        section = getattr(config, name)
        if section.enabled and 0 < arch.max_positions < section.sequence_length:
            yield (
                f"{name}.sequence_length {section.sequence_length} is longer than the "
                f"{arch.max_positions} positions the model was made for"
            )
    if unknown_text:
        yield (
            f"the size of the evaluation text is not known: {work.windows} windows are assumed; "
            "set evaluation.windows to bound it"
        )


CORPUS_NAMES = {
    "salesforce/wikitext": "wikitext2",
    "wikitext": "wikitext2",
    "allenai/c4": "c4",
    "togethercomputer/redpajama-data-1t-sample": "redpajama",
    "dkyoon/slimpajama-6b": "slimpajama",
    "cerebras/slimpajama-627b": "slimpajama",
    "huggingfacefw/fineweb-edu": "fineweb-edu",
}
LOCAL_CORPORA = {r"wiki(text)?[-_. ]?2|wiki\.(train|valid|validation|test)\b": "wikitext2"}
"""Local copies recognised by their usual file names."""


def corpus(data: DataConfig) -> str:
    """The corpus behind a data configuration, whichever way it is reached."""
    source = data.source
    if source.lower() in CORPUS_NAMES:
        return CORPUS_NAMES[source.lower()]
    path = Path(source).expanduser()
    if not path.exists():
        return source
    path = path.resolve()
    for pattern, name in LOCAL_CORPORA.items():
        if any(re.search(pattern, part.lower()) for part in (path.name, path.parent.name)):
            return name
    return str(path)


# --------------------------------------------------------------------------------------------- windows

CORPUS_CHARACTERS = {"wikitext2": 1_290_000, "builtin": 70_000}
"""Length of the evaluation text: WikiText-2's test split; the built-in corpus' evaluation part."""
UNKNOWN_CHARACTERS = 2_000_000


def evaluation_windows(config: RunConfig, arch: Architecture) -> tuple[int, bool]:
    """How many windows are evaluated, and whether that is a guess."""
    section = config.evaluation
    if not section.enabled:
        return 0, False
    name = corpus(section.data)
    path = Path(section.data.source).expanduser()
    characters = CORPUS_CHARACTERS.get(name)
    if characters is None and path.is_file():
        characters = path.stat().st_size
    known = characters is not None
    windows = int((characters or UNKNOWN_CHARACTERS) / _characters_per_token(arch)) // section.sequence_length
    if section.windows:
        windows = min(windows, section.windows) if known else section.windows
    return max(1, windows), not known and not section.windows


def _characters_per_token(arch: Architecture) -> float:
    """English text: WikiText-2's test split has 341 469 tokens for Llama 2, 289 077 for Llama 3."""
    if arch.vocab < 1024:
        return 1.0 if arch.vocab <= 300 else 1.6
    return 3.8 if arch.vocab < 40_000 else 4.4


def _text(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"
