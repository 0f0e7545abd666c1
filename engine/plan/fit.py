"""What fits where: the place of the activation streams, what is too large, and the least painful remedy.

:class:`Place` is everything about the machine and the model's files that estimates depend on, so that a run
with other settings can be judged like the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from engine.config.fields import is_operational
from engine.config.run import RunConfig
from engine.config.runtime import StoreKind
from engine.config.stages import STAGES, stages_of
from engine.plan.costs import Ladder, Pain, StageCosts, Training, costs_of, down_to_one, halves, made_costs
from engine.plan.disk_model import disk_peaks
from engine.plan.estimate import CONSTANTS, GIB, Workload, size_text
from engine.plan.machine import Machine
from engine.plan.memory_model import host_memory, phase_memory
from engine.plan.own_text import writing_memory
from engine.plan.ranks import shown
from engine.plan.rates import Speed
from engine.plan.recovery_model import Recovery, recovery
from engine.plan.time_model import phase_seconds

GPU_RESERVE = 0.10
"""Part of the free GPU memory that the choice of the activation store leaves alone."""
HOST_RESERVE = 0.10
"""Part of the free host memory that a run leaves to others, unless a budget is given."""


OTHER_TEXT = "train on text that the model need not write: data.source or data.mix without self"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not fit."""

    where: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} ({self.hint})"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run would happen, and what it reads there."""

    machine: Machine
    rates: Speed
    stored_bytes: int
    """Of the model's weights as they are stored."""
    assets_bytes: int
    """Of what an export has besides its tensors."""

    def trainings(self, work: Workload) -> list[Training]:
        """What checkpoints have to keep up with."""
        found = (costs.training(work, self.rates, self.stored_bytes) for costs in made_costs(work.config))
        return [training for training in found if training is not None]

    def seconds(self, work: Workload) -> dict[str, float]:
        """Duration of each phase."""
        return {phase: phase_seconds(work, phase, self.rates, self.stored_bytes) for phase in work.phases()}

    def recovery(self, work: Workload, store: StoreKind) -> Recovery:
        """How the run would be checkpointed here."""

        def fits(found: Recovery) -> bool:
            return self.disk_needed(work, store, found) <= self.machine.disk_free

        return recovery(work, self.trainings(work), self.seconds(work), fits)

    def disk_peaks(self, work: Workload, store: StoreKind, found: Recovery) -> dict[str, int]:
        """What the run directory grows to in each phase of a run that nobody stops."""
        return disk_peaks(work, store, found, self.seconds(work), self.assets_bytes, stopped=False)

    def disk_needed(self, work: Workload, store: StoreKind, found: Recovery | None = None) -> int:
        """What it grows to at most, stopped or not."""
        found = found or self.recovery(work, store)
        seconds = self.seconds(work)
        return max(disk_peaks(work, store, found, seconds, self.assets_bytes, stopped=True).values())


# ----------------------------------------------------------------------------------- activation store


def choose_store(work: Workload, machine: Machine) -> tuple[StoreKind, str]:
    """The fastest place with room for the activation streams, and why."""
    wanted = work.config.runtime.activation_store
    if wanted != "auto":
        return wanted, "set by runtime.activation_store"
    size = size_text(max(phase_memory(work, phase).stored for phase in work.phases()))
    if work.cuda and fits_device(work, machine.gpu_free):
        return "device", f"{size} of activations fit into GPU memory beside the training"
    if peak_host(work, "host") <= host_budget(work.config, machine):
        return "host", f"{size} of activations fit into host memory"
    return "disk", f"{size} of activations fit neither into GPU nor into host memory"


ALMOST = 1.03
"""A training that takes this many times the shortest counts as no longer: what needs less memory wins."""


def settle_network(work: Workload, machine: Machine, rates: Speed) -> Workload:
    """How a training of the whole network goes about it, where that is left to the plan: how many sequences
    pass at a time, and whether each block's activations are kept or recomputed.

    The fastest way that fits wins; but none is worth moving the activation streams to a slower place.
    ``work`` asks for the least memory of all ways.
    """
    store, _ = choose_store(work, machine)
    networks = [costs for costs in made_costs(work.config) if costs.stage.scope == "network"]
    short, roomy = (
        _settle_micro_batches(msgspec.structs.replace(work, short_of_memory=value), store, machine, rates)
        for value in (True, False)
    )
    if not all(_has_room(costs, roomy, store, machine) for costs in networks):
        return short

    def seconds(work: Workload) -> float:
        return sum(costs.seconds(work, rates, 0) for costs in networks)

    return roomy if seconds(roomy) <= seconds(short) else short


def _settle_micro_batches(work: Workload, store: StoreKind, machine: Machine, rates: Speed) -> Workload:
    """Every stage of the whole network that leaves it to the plan passes as many sequences at a time as make
    it faster and fit."""
    for costs in made_costs(work.config):
        if costs.stage.name not in work.open_micro_batches:
            continue
        ways = [costs.with_micro_batch(work, count) for count in costs.micro_batches(work.config)]
        fitting = [way for way in ways if _has_room(costs, way, store, machine)] or ways[:1]
        seconds = [costs.seconds(way, rates, 0) for way in fitting]
        work = next(way for way, one in zip(fitting, seconds, strict=True) if one <= ALMOST * min(seconds))
    return work


def _has_room(costs: StageCosts, work: Workload, store: StoreKind, machine: Machine) -> bool:
    memory = phase_memory(work, costs.stage.name)
    if work.cuda:
        return memory.gpu(store) <= (machine.gpu_free - CONSTANTS.cuda_context) * (1 - GPU_RESERVE)
    return host_memory(work, memory, store) <= host_budget(work.config, machine)


def recomputes(work: Workload) -> bool:
    """Whether a training of the whole network recomputes activations; where there is none, whether the first
    that there could be would."""
    made = [stage for stage in stages_of(work.config) if stage.scope == "network"]
    asked = made or [stage for stage in STAGES if stage.scope == "network"][:1]
    return any(costs_of(stage).recomputes(work) for stage in asked)


def fits_device(work: Workload, gpu_free: int) -> bool:
    """Whether a GPU with so much free memory has room for the streams beside the training."""
    return peak_gpu(work, "device") <= (gpu_free - CONSTANTS.cuda_context) * (1 - GPU_RESERVE)


def peak_gpu(work: Workload, store: StoreKind) -> int:
    return max(phase_memory(work, phase).gpu(store) for phase in work.phases())


def peak_host(work: Workload, store: StoreKind) -> int:
    return max(host_memory(work, phase_memory(work, phase), store) for phase in work.phases())


def host_budget(config: RunConfig, machine: Machine) -> int:
    """Host memory that the run may use."""
    if config.runtime.host_memory_gib:
        return int(config.runtime.host_memory_gib * GIB)
    return int(machine.host_free * (1 - HOST_RESERVE))


def whole_model_budget(config: RunConfig, machine: Machine, *, cuda: bool) -> int:
    """Memory for a phase that has all blocks there at once, and what it makes with them."""
    return int(machine.gpu_free * (1 - GPU_RESERVE)) if cuda else host_budget(config, machine)


# ------------------------------------------------------------------------------------------- problems


def problems(work: Workload, store: StoreKind, place: Place) -> Iterator[Problem]:
    """What does not fit, each with a setting that would."""
    machine = place.machine
    if work.cuda and machine.gpu_name is None:
        yield Problem(
            where="runtime.device",
            message="no usable NVIDIA GPU was found",
            hint="use --set runtime.device=cpu",
        )
        return
    limits = _limits(work, machine)
    if work.cuda and peak_gpu(work, store) > limits.gpu:
        phase = max(work.phases(), key=lambda name: phase_memory(work, name).gpu(store))
        yield Problem(
            where=phase,
            message=f"{size_text(peak_gpu(work, store))} of GPU memory are needed and "
            f"{size_text(limits.gpu)} are free on this {machine.gpu_name}",
            hint=_remedy(work, store, place)
            or (
                OTHER_TEXT
                if phase == "prepare"
                else "use a GPU with more memory, or --set runtime.device=cpu"
            ),
        )
    if peak_host(work, store) > limits.host:
        phase = max(work.phases(), key=lambda name: host_memory(work, phase_memory(work, name), store))
        stated, more = "what may be used is", "use a machine with more memory"
        if work.config.runtime.host_memory_gib:
            stated, more = "the budget is", f"raise runtime.host_memory_gib, or {more}"
        yield Problem(
            where=phase,
            message=f"{size_text(peak_host(work, store))} of host memory are needed and {stated} "
            f"{size_text(limits.host)}",
            hint=_remedy(work, store, place)
            or (OTHER_TEXT if phase == "prepare" and writing_memory(work) else more),
        )
    needed = place.disk_needed(work, store)
    if needed > limits.disk:
        yield Problem(
            where="disk",
            message=f"the run needs {size_text(needed)} of disk and {size_text(limits.disk)} are free",
            hint=_remedy(work, store, place) or "free some space or use --runs-dir on another disk",
        )


class _Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What may be used."""

    gpu: int
    host: int
    disk: int


def _limits(work: Workload, machine: Machine) -> _Limits:
    return _Limits(
        gpu=max(0, machine.gpu_free - CONSTANTS.cuda_context),
        host=host_budget(work.config, machine),
        disk=machine.disk_free,
    )


def _fits(work: Workload, store: StoreKind, place: Place, limits: _Limits) -> bool:
    return (
        (not work.cuda or peak_gpu(work, store) <= limits.gpu)
        and peak_host(work, store) <= limits.host
        and place.disk_needed(work, store) <= limits.disk
    )


def _remedy(work: Workload, store: StoreKind, place: Place) -> str:
    """The least painful change after which everything fits; empty when there is none."""
    limits = _limits(work, place.machine)
    for text, other, kept in _changes(work, store):
        if _fits(other, kept, place, limits):
            return f"{text} would fit"
    return ""


def gpu_remedy(work: Workload, place: Place) -> str:
    """What to do about a GPU whose memory did not suffice although every batch was halved down to one
    sequence; empty when no setting helps. ``place.machine.gpu_free`` is what torch can have.

    What may be changed in a run that is resumed comes first. The rest takes a new one.
    """
    config = work.config
    for ladder in _ladders(config):
        if ladder.is_batch:
            config = _change(config, ladder.section, ladder.field, 1)
    work = msgspec.structs.replace(work, config=config)
    limits = msgspec.structs.replace(_limits(work, place.machine), gpu=place.machine.gpu_free)
    store, _ = choose_store(work, _as_it_began(place.machine))
    for text, other, kept in _changes(work, store):
        if peak_gpu(other, kept) < peak_gpu(work, store) and _fits(other, kept, place, limits):
            settings = text.replace(" with ", ", ").split(", ")
            if all(is_operational(setting.partition(" = ")[0]) for setting in settings):
                return f"set {text}"
            return f"free the GPU (a new run with {text} would fit)"
    return ""


def _as_it_began(machine: Machine) -> Machine:
    """When the run chose its place for the streams, the GPU was as good as empty."""
    return msgspec.structs.replace(machine, gpu_free=machine.gpu_total)


def _changes(work: Workload, store: StoreKind) -> Iterator[tuple[str, Workload, StoreKind]]:
    """Ever smaller variants of the run, the least painful first: (what to set, workload, store)."""
    if work.config.runtime.streams == "stored":
        config = _change(work.config, "runtime", "streams", "recomputed")
        yield "runtime.streams = recomputed", msgspec.structs.replace(work, config=config), store
    slower: dict[StoreKind, tuple[StoreKind, ...]] = {
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
    ladders = _ladders(config)
    for ladder in ladders:
        for value in ladder.values:
            changed = _change(config, ladder.section, ladder.field, value)
            told = shown(config, ladder.field, value)
            yield f"{ladder.section}.{ladder.field} = {str(told).lower()}", changed
    said: dict[str, str] = {}
    for ladder in ladders:
        for value in ladder.values:
            config = _change(config, ladder.section, ladder.field, value)
            told = shown(config, ladder.field, value)
            said[f"{ladder.section}.{ladder.field}"] = str(told).lower()
            yield ", ".join(f"{name} = {value}" for name, value in said.items()), config


def _change(config: RunConfig, section: str, field: str, value: Any) -> RunConfig:
    part = msgspec.structs.replace(getattr(config, section), **{field: value})
    return msgspec.structs.replace(config, **{section: part})


def _ladders(config: RunConfig) -> Sequence[Ladder]:
    """Settings that can be lowered and the values to try, the least painful first; of those that hurt alike,
    the evaluation's before the stages'."""
    ladders = list(_smaller_evaluation(config)) if config.evaluation.enabled else []
    for costs in made_costs(config):
        ladders += costs.smaller(config)
    return sorted(ladders, key=lambda ladder: ladder.pain)


def _smaller_evaluation(config: RunConfig) -> Iterator[Ladder]:
    section, name = config.evaluation, "evaluation"
    yield Ladder(Pain.SLOWER, name, "batch_size", down_to_one(section.batch_size), is_batch=True)
    yield Ladder(Pain.OTHER_MEASURE, name, "sequence_length", halves(section.sequence_length, 256))
