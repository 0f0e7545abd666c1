"""The plan: what a run will need and whether it fits, before anything is loaded.

    model header -> sizes -> memory and disk of each phase, time, checkpoints
    machine      -> where the activation streams live, what does not fit and what would (fit.py)

Everything is computed from config.json or file headers in well under a second. Unsupported models raise
at once (``refusals.py``); what does not fit is listed in :attr:`Plan.problems`, each in one sentence with
a setting that would fit, so that ``eqat plan`` can show the whole picture. :func:`check` turns the first
of them into the error a run ends with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.architecture.description import ModelDescription, describe
from engine.architecture.families import Architecture, text_config
from engine.architecture.model_folder import ModelFolder
from engine.architecture.refusals import refuse
from engine.architecture.special_tokens import (
    begin_of_text,
    begin_words,
    generation_settings,
    refuse_special_tokens,
    unused_tokens,
)
from engine.config.calibration import (
    evaluated_share,
    part_name,
    percent,
    shared_out,
    texts_of,
)
from engine.config.corpora import evaluation_characters, local_path, origin
from engine.config.data import DataConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.formats import FORMATS
from engine.config.learning import learned_words
from engine.config.run import RunConfig
from engine.config.runtime import StoreKind
from engine.config.stages import Scope, learns_answers
from engine.config.tasks import require_lm_eval
from engine.errors import EqatError, PreflightError
from engine.plan.advice import better_recipe
from engine.plan.costs import StageCosts, Steps, Text, made_costs
from engine.plan.disk_model import assets_bytes
from engine.plan.estimate import Workload
from engine.plan.export_sizes import head_words, number_bytes, sizes
from engine.plan.fit import (
    Place,
    Problem,
    choose_store,
    gpu_remedy,
    problems,
    recomputes,
    settle_network,
    whole_model_budget,
)
from engine.plan.lengths import longer_than_trained, too_long
from engine.plan.link import link_of
from engine.plan.local_files import check_local_files
from engine.plan.machine import Machine, detect
from engine.plan.memory_model import host_memory, phase_memory
from engine.plan.opened import opened
from engine.plan.own_text import documents_here
from engine.plan.paper import Published, published
from engine.plan.passages import compiles_passages
from engine.plan.portions import numbers_together
from engine.plan.ranks import adding_seconds, in_words, obstacles, share_of
from engine.plan.rates import Speed, speed
from engine.plan.recovery_model import Recovery, broken_promise
from engine.plan.streams import refuse_unknown_teacher, stream_bytes
from engine.system.allowance import threads


class PhasePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of the run."""

    name: str
    peak_gpu_bytes: int | None
    """Peak of torch's allocator; none on the CPU."""
    peak_host_bytes: int
    peak_disk_bytes: int
    """What the run directory grows to, nameless files included, if nobody stops the run."""
    seconds: float
    parts: dict[str, int]
    """What the peak consists of, without the process itself; bytes."""


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
    """What the run directory grows to at most: also where a stop adds a checkpoint to what there is."""
    export_bytes: int
    """Of all exports together."""
    export_sizes: dict[str, int]
    """Of each format; of the default one where none is written."""
    fp_bytes: int
    bits_per_weight: float
    zero_points: str
    """Where all of them are fixed and what that opens; empty where each group has its own."""
    head: str
    """How embedding and head are quantized, and what that saves; empty where they stay numbers."""
    activation_store: StoreKind
    activation_store_reason: str
    stream_bytes: int
    """One of the activation streams that blocks are made on."""
    recovery: Recovery
    calibration: str
    """The text that is learned from, several with their shares; empty where nothing is."""
    begin: str
    """How sequences begin."""
    evaluation_windows: int
    seconds: float
    time_basis: str
    fast: bool
    """The steps that train a block are recorded, and quantize, train and quantize again in one kernel."""
    compiles: bool
    """The steps that train a block are compiled."""
    compiles_e2e: bool
    """Blocks are compiled for the training of the whole network; called so since E2E-QP was the only one."""
    compiles_passages: bool
    """Blocks are compiled for the streams that pass through them, and for perplexity."""
    micro_batches: dict[str, int]
    """Sequences that pass at a time, by the name of each stage that trains the whole network."""
    numbers_together: int
    """Numbers of hidden states that pass through a block together, at least, where nothing is trained."""
    recomputes: bool
    """The training of the whole network recomputes each block's activations in the backward pass."""
    published: Published | None
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    machine: Machine
    gpus: int = 1
    together: str = ""
    """What several GPUs bring, and over which link, in words; empty for one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for events and ``--json``."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result


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
        UsageError: for a training that would learn from an original model which is not known.
    """
    check_local_files(config, reads_text=bool(_texts(config)))
    require_lm_eval(config.evaluation.tasks if config.evaluation.enabled else ())
    refuse_unknown_teacher(config)
    model = described(config)
    refuse(model.architecture, model.config, config.grid, config.export.formats)
    _refuse_tokens(config, model)
    wanted = device or config.runtime.device
    machine = machine or detect(runs_dir, wanted, config.runtime.gpus)
    work, unknown_text = _workload(config, model, machine, wanted)
    work = settle_network(work, machine, _rates(work, machine))
    place = _place(work, model, machine)
    store, reason = choose_store(work, machine)
    recovery = place.recovery(work, store)
    phases = tuple(_phases(work, store, place, recovery))
    promise = broken_promise(work, place.trainings(work), place.seconds(work), recovery)
    seconds = sum(phase.seconds for phase in phases)
    alone = _seconds_alone(config, seconds, machine, wanted, runs_dir)
    size = sizes(work.arch, config.grid, config.export.formats, number_bytes(config.export.dtype))
    return Plan(
        model=config.model.source,
        model_type=work.arch.model_type,
        parameters=work.arch.params,
        blocks=work.arch.blocks,
        exact=work.arch.exact,
        device="cuda" if work.cuda else "cpu",
        phases=phases,
        peak_gpu_bytes=max(phase.peak_gpu_bytes or 0 for phase in phases) if work.cuda else None,
        peak_host_bytes=max(phase.peak_host_bytes for phase in phases),
        disk_bytes=place.disk_needed(work, store, recovery),
        export_bytes=sum(size.exports.values()),
        export_sizes=size.exports,
        fp_bytes=size.fp,
        bits_per_weight=size.bits_per_weight,
        zero_points=opened(config.grid.shared, (linear.in_features for linear in work.arch.linears)),
        head=head_words(work.arch, config.grid),
        activation_store=store,
        activation_store_reason=reason,
        stream_bytes=stream_bytes(work),
        recovery=recovery,
        calibration=learned_words(config),
        begin=_begin(config, model),
        evaluation_windows=evaluation_windows(config, work.arch)[0],
        seconds=seconds,
        time_basis=f"estimate: operations and memory traffic counted, at {place.rates.basis}",
        fast=_trains(work, "block", place.rates).recorded,
        compiles=_trains(work, "block", place.rates).compiled,
        compiles_e2e=_trains(work, "network", place.rates).compiled,
        compiles_passages=compiles_passages(work, place.rates),
        micro_batches=_micro_batches(work),
        numbers_together=numbers_together(work),
        recomputes=recomputes(work),
        published=published(config.model.source, work.arch, config.grid),
        warnings=_present(
            *_warnings(config, work, model, unknown_text), better_recipe(work, machine.gpu_free), promise
        ),
        problems=(
            *_too_long(config, work.arch),
            *(
                Problem(where="runtime.gpus", message=message, hint=hint)
                for message, hint in obstacles(config, machine, seconds, alone)
            ),
            *problems(work, store, place),
        ),
        machine=machine,
        gpus=config.runtime.gpus,
        together=in_words(config, link_of(machine, cuda=work.cuda), seconds, alone),
    )


def _seconds_alone(
    config: RunConfig, seconds: float, machine: Machine, device: str, runs_dir: Path | None
) -> float:
    """What one GPU would take for it."""
    if config.runtime.gpus == 1:
        return seconds
    runtime = msgspec.structs.replace(config.runtime, gpus=1)
    one = msgspec.structs.replace(config, runtime=runtime)
    return make_plan(one, machine=machine, device=device, runs_dir=runs_dir).seconds


def _present(*lines: str) -> tuple[str, ...]:
    return tuple(line for line in lines if line)


def _too_long(config: RunConfig, arch: Architecture) -> Iterator[Problem]:
    for refusal in too_long(config, arch.position_table):
        yield Problem(where=refusal.where, message=refusal.message, hint=refusal.hint)


def _trains(work: Workload, scope: Scope, rates: Speed) -> Steps:
    """How a block, or the whole network, is trained."""
    of_scope = [costs for costs in made_costs(work.config) if costs.stage.scope == scope]
    steps = [costs.steps(work, rates) for costs in of_scope]
    return Steps(any(one.recorded for one in steps), any(one.compiled for one in steps))


def _micro_batches(work: Workload) -> dict[str, int]:
    """Of every training of the whole network that has such a setting."""
    found = {costs.stage.name: costs.micro_batch(work.config) for costs in made_costs(work.config)}
    return {name: count for name, count in found.items() if count is not None}


def _texts(config: RunConfig) -> list[Text]:
    """The calibration texts of the stages; conversations are none."""
    plain = [costs for costs in made_costs(config) if not learns_answers(config, costs.stage)]
    return [text for text in (costs.text(config) for costs in plain) if text is not None]


def described(config: RunConfig) -> ModelDescription:
    """The model of a run."""
    return describe(config.model.source, config.model.revision, packed=config.imported.enabled)


def _refuse_tokens(config: RunConfig, model: ModelDescription) -> None:
    """What the engine would say of the tokenizer once it has loaded everything."""
    folder = _folder(config, model)
    if folder is not None:
        rows, trains = model.architecture.vocab, bool(_texts(config))
        refuse_special_tokens(folder, rows, config.model.bos, trains=trains)


def _begin(config: RunConfig, model: ModelDescription) -> str:
    """How sequences begin, by what is asked for and by what the tokenizer's files show."""
    folder = _folder(config, model)
    token = begin_of_text(folder, config.model.bos) if folder is not None else ""
    return begin_words(config.model.bos, token)


def _folder(config: RunConfig, model: ModelDescription) -> ModelFolder | None:
    """The model's folder, where it lies in one on this machine."""
    local = model.kind in ("safetensors", "config", "packed")
    return ModelFolder.judge(local_path(config.model.source)) if local else None


def check(plan: Plan, *, waits_for_room: bool = False) -> None:
    """Raise PreflightError for the first thing that does not fit; a disk counts unless it is waited for."""
    found = [problem for problem in plan.problems if not (waits_for_room and problem.where == "disk")]
    for problem in found[:1]:
        raise PreflightError(problem.message, where=problem.where, hint=problem.hint)


def out_of_memory_remedy(config: RunConfig, machine: Machine) -> str:
    """What to do about a GPU whose memory did not suffice although nothing is left to halve, as the begin of
    a sentence that goes on with "then resume"; empty when no setting would help.

    ``machine`` is the one that the run was planned on, its ``gpu_free`` what torch can have now: free memory
    and what this process has reserved.
    """
    try:
        model = described(config)
        work, _ = _workload(config, model, machine, "cuda")
        return gpu_remedy(work, _place(work, model, machine))
    except EqatError:  # the model's files are gone, of all moments now: the failure at hand is the other one
        return ""


def _workload(
    config: RunConfig, model: ModelDescription, machine: Machine, device: str
) -> tuple[Workload, bool]:
    """What is to be done, and whether the size of the evaluation text is a guess."""
    cuda = device.startswith("cuda") or (device == "auto" and machine.gpu_name is not None)
    windows, unknown_text = evaluation_windows(config, model.architecture)
    work = Workload(arch=model.architecture, config=share_of(config), cuda=cuda, windows=windows)
    if config.runtime.gpus > 1:
        adding = adding_seconds(work, link_of(machine, cuda=cuda), 1.0)
        share = -(-windows // config.runtime.gpus)
        work = msgspec.structs.replace(work, whole=config, adding=adding, windows=share)
    open_ones = [costs for costs in made_costs(config) if costs.micro_batch(config) == 0]
    for costs in open_ones:
        work = costs.with_micro_batch(work, 1)
    rates = _rates(work, machine)
    return msgspec.structs.replace(
        work,
        compiled=_named(costs for costs in made_costs(config) if costs.steps(work, rates).compiled),
        open_micro_batches=_named(open_ones),
        documents=documents_here(work, whole_model_budget(config, machine, cuda=cuda)),
    ), unknown_text


def _named(found: Iterable[StageCosts]) -> frozenset[str]:
    return frozenset(costs.stage.name for costs in found)


def _rates(work: Workload, machine: Machine) -> Speed:
    runtime = work.config.runtime
    cpus = threads(runtime.threads, runtime.gpus, gpu=work.cuda, there=machine.cpus)
    # More threads than there are processors compute nothing sooner.
    return speed(work.cuda, machine.gpu_name or "", min(cpus, machine.cpus), machine.avx512)


def _place(work: Workload, model: ModelDescription, machine: Machine) -> Place:
    return Place(
        machine=machine,
        rates=_rates(work, machine),
        stored_bytes=model.stored_bytes or work.arch.params * work.arch.dtype_bytes,
        assets_bytes=assets_bytes(model),
    )


def _phases(work: Workload, store: StoreKind, place: Place, recovery: Recovery) -> Iterator[PhasePlan]:
    seconds, disk = place.seconds(work), place.disk_peaks(work, store, recovery)
    for name in work.phases():
        memory = phase_memory(work, name)
        parts = dict(memory.device)
        if memory.stored and store != "disk":
            parts[f"activation store ({store})"] = memory.stored
        if memory.written:
            parts["checkpoint being written"] = memory.written
        yield PhasePlan(
            name=name,
            peak_gpu_bytes=memory.gpu(store) if work.cuda else None,
            peak_host_bytes=host_memory(work, memory, store),
            peak_disk_bytes=disk[name],
            seconds=seconds[name],
            parts=parts,
        )


# ------------------------------------------------------------------------------------------- warnings


def _warnings(
    config: RunConfig, work: Workload, model: ModelDescription, unknown_text: bool
) -> Iterator[str]:
    arch = work.arch
    texts = _texts(config)
    share = evaluated_share(config.data, config.evaluation.data)
    if texts and config.evaluation.enabled and share:
        part = "" if share == 1 else f"{percent(share)} of "
        yield (
            f"{part}calibration and evaluation both use {origin(config.evaluation.data)}: the result will "
            "look better than on other text; evaluate on another corpus to compare models"
        )
    yield from _unread(config)
    for costs in made_costs(config):
        yield from costs.warnings(config)
    if model.kind == "gguf" and model.stored_bytes and model.stored_bytes < 1.5 * arch.params:
        yield (
            "the GGUF file holds quantized weights already: full precision here means as good as this file"
        )
    for name in config.export.formats:
        outputs = (linear.out_features for linear in arch.linears)
        yield from FORMATS[name].warnings(config.grid.shared, outputs)
        yield from FORMATS[name].consequences(arch, model.config, config.grid)
    if not arch.exact:
        yield f"sizes of model type {arch.model_type!r} are estimated as if it were a Llama"
    if arch.carried:
        first, more = arch.carried[0][0], ", …" if len(arch.carried) > 1 else ""
        without = [name for name in config.export.formats if not FORMATS[name].carries]
        yield (
            f"the checkpoint holds {arch.carried_bytes / 2**20:.1f} MiB besides the model ({first}{more}): "
            "exports carry it over as it is"
            + (f", but not {' and '.join(without)}, whose loaders refuse it" if without else "")
        )
    if model.kind == "config":
        yield "no weight files were found beside config.json: planned from config.json alone"
    settings: dict[str, Mapping[str, Any]] = {"config.json": text_config(model.config)}
    if (folder := _folder(config, model)) is not None:
        settings["generation_config.json"] = generation_settings(folder)
    yield from unused_tokens(settings, arch.vocab)
    yield from longer_than_trained(config, arch)
    if unknown_text:
        yield (
            "the size of the evaluation text is not known: "
            f"{evaluation_windows(config, arch)[0]} windows are assumed; set evaluation.windows to bound it"
        )


def _unread(config: RunConfig) -> Iterator[str]:
    """Texts of a mixture that are left without a sequence to train on, because there are so few."""
    parts = texts_of(config.data)
    for text in _texts(config):
        for part, count in zip(parts, shared_out(parts, text.sequences), strict=True):
            if not count:
                yield (
                    f"{part_name(part.data)} gives no sequence: {percent(part.share)} of "
                    f"{text.section}.sequences = {text.sequences} is less than one"
                )


# --------------------------------------------------------------------------------------------- windows

UNKNOWN_CHARACTERS = 2_000_000


def evaluation_windows(config: RunConfig, arch: Architecture) -> tuple[int, bool]:
    """How many windows are evaluated, and whether that is a guess."""
    section = config.evaluation
    if not section.enabled:
        return 0, False
    counted = [_windows_of(data, section, arch) for data in section.every_text()]
    return sum(count for count, _ in counted), any(guessed for _, guessed in counted)


def _windows_of(data: DataConfig, section: EvaluationConfig, arch: Architecture) -> tuple[int, bool]:
    path = local_path(data.source)
    characters = evaluation_characters(data)
    if characters is None and os.path.isfile(path):
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
