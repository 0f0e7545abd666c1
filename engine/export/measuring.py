"""A checkpoint of anybody read on texts: ``python -m engine.export.measuring``, asked on its stdin.

It may be a model of Hugging Face's form in a folder or on the hub, a .gguf file, or a quantized checkpoint in
any format of the table, which is read with dequantized weights. It passes block by block like a run's model;
what must fit is one block and the hidden states, which lie in host memory or on the disk. Beside a reference
model, its divergence from that is measured.

What it has to say are lines of JSON on stdout: ``{"doing": ..}`` and ``{"done": .., "of": ..}`` while it
works, and at the end one object, ``{"measured": [..]}`` or ``{"error": ..}`` in the words of an EqatError.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the engine does, before anything loads OpenMP

import msgspec
import torch
from torch import Tensor

from engine.architecture.description import resolve_source
from engine.config.dtypes import resolved_dtype
from engine.config.formats import FORMATS
from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.config.runtime import StoreKind
from engine.config.tables import load_extensions
from engine.config.tasks import lm_task, require_lm_eval, task_name
from engine.data.encoding import Encoder
from engine.data.tasks import questions
from engine.data.tokens import token_windows
from engine.errors import EqatError, ExitCode, PreflightError
from engine.evaluation.answering import Means, answering
from engine.evaluation.beside import Version
from engine.evaluation.harness import ask, find_tasks
from engine.evaluation.measurement import Measurement, read, result_of
from engine.evaluation.room import free_for_blocks
from engine.evaluation.tasks import accuracies, own_score, tokenize
from engine.export.described import PLAIN, format_in
from engine.export.imported import refuse_description
from engine.export.judging import UNFIT
from engine.export.layout import Layout, form_of
from engine.models.causal_lm import CausalLM
from engine.models.foreign import foreign
from engine.models.hub import download
from engine.models.skeleton import text_config
from engine.models.source import ModelSource
from engine.offline import everything_is_local, offline
from engine.plan.fit import host_budget
from engine.plan.machine import detect
from engine.process import choose_device, device_name, prepare_process
from engine.run.measured import How, MeasureRequest, as_asked, by_flags
from engine.run.measures import TaskScore
from engine.system.files import make_folder
from engine.system.user_cache import token_cache


class Opened:
    """A model that is to be measured, and what it was found to be."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        dtype = getattr(torch, resolved_dtype("auto", cuda=device.type == "cuda"))
        self.format, self.lm = open_model(model, device, dtype)

    @property
    def version(self) -> Version:
        return Version(self.lm, self.lm.load_block)


def open_model(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[str, CausalLM]:
    """The format that ``model`` is in, and the model; no block is loaded yet.

    Raises:
        EqatError: for what is no model that can be read.
    """
    found = resolve_source(model.source)
    if isinstance(found, str) and "://" in found:
        return PLAIN, CausalLM(ModelSource.open(model), device, dtype)
    folder = found if isinstance(found, Path) else None
    if folder is None:
        folder = download(str(found), model.revision, trust_remote_code=model.trust_remote_code)
    name = format_in(folder)
    if name == "gguf":
        file = gguf_file(folder)
        return name, CausalLM(ModelSource.open(ModelConfig(source=str(file))), device, dtype)
    if name == PLAIN:
        return name, CausalLM(ModelSource.open(model), device, dtype)
    form = form_of(name)
    try:
        if isinstance(form, Layout):
            refuse_description(form.reader(folder), "measured")
        return name, form.open(folder, device, dtype, trust_remote_code=model.trust_remote_code)
    except UNFIT as error:
        said = (str(error).splitlines() or [""])[0][:120]
        raise PreflightError(
            f"its tensors do not fit each other: {said}", where=str(folder), hint="eqat verify looks at each"
        ) from error


def gguf_file(place: Path) -> Path:
    """The .gguf file that is meant by itself or by its folder."""
    if place.is_file():
        return place
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise PreflightError(f"holds {len(files)} .gguf files", where=str(place), hint="name one of them")
    return files[0]


def measure(request: MeasureRequest) -> dict[str, Any]:
    """What ``eqat eval`` prints of a checkpoint.

    Raises:
        EqatError: for a model, a text or a reference that cannot be read.
    """
    model = ModelConfig(source=request.source, trust_remote_code=request.trust_remote_code)
    config = as_asked(RunConfig(model=model), request.how)
    config.runtime.check("runtime")
    reference = ModelConfig(source=request.reference or request.source)
    others = [msgspec.structs.replace(config, model=one) for one in (config.model, reference)]
    with offline(all(map(everything_is_local, others))):
        device = choose_device(request.device)
        prepare_process(config.runtime, device)
        say({"doing": "opening the model"})
        opened = Opened(config.model, device)
        warnings: list[str] = []
        config = _within_reach(config, opened.lm, request.how, warnings)
        with foreign("the tokenizer cannot be loaded", request.source):
            tokenizer = opened.lm.source.tokenizer()
        encoder = Encoder(tokenizer, rows=opened.lm.vocab_size, bos=config.model.bos)
        say({"doing": "reading the text" if request.how.reads_texts else "reading tasks"})
        asks = _Questions(config, opened.lm, encoder)
        texts = windows_of(config, encoder, warnings) if request.how.reads_texts else []
        full = None
        if request.reference:
            say({"doing": "opening the reference"})
            full = Opened(reference, device)
            require_comparable(opened.lm, full.lm, request.reference)
        found = _read(config, opened, full, torch.cat(texts), len(encoder.begin), warnings) if texts else None
        scores = asks.answers()
    results, first = [], 0
    for name, windows in zip(config.evaluation.text_names(), texts, strict=False):
        assert found is not None
        results.append(
            result_of(
                found,
                name,
                (first, first + len(windows)),
                sequence_length=config.evaluation.sequence_length,
                begin=encoder.words(),
                device=device_name(device),
            )
        )
        first += len(windows)
    return {
        "source": request.source,
        "format": opened.format,
        "label": FORMATS[opened.format].label,
        "model_type": str(opened.lm.source.config.model_type),
        "blocks": opened.lm.blocks,
        "reference": request.reference or None,
        "warnings": warnings,
        "measured": msgspec.to_builtins(results),
        "scores": msgspec.to_builtins(scores),
    }


class _Questions:
    """Tasks that a checkpoint is asked, found before anything is measured."""

    def __init__(self, config: RunConfig, lm: CausalLM, encoder: Encoder) -> None:
        self.config, self.lm, self.encoder = config, lm, encoder
        section = config.evaluation
        require_lm_eval(section.tasks)
        own = [name for name in section.tasks if lm_task(name) is None]
        self.own = {
            task_name(name): tokenize(questions(name, section.task_limit), encoder, lm.position_table)
            for name in own
        }
        asked = [task for name in section.tasks if (task := lm_task(name)) is not None]
        options = {"folder": section.task_folder, "limit": section.task_limit, "chat": section.task_chat}
        self.others = find_tasks(asked, **options) if asked else None  # type: ignore[arg-type]

    def answers(self) -> list[TaskScore]:
        """Of the tasks that eqat asks itself first, then of lm-eval's."""
        scores: list[TaskScore] = []
        place = token_cache().parent
        make_folder(place)
        if self.own:
            say({"doing": "asking questions"})
            found = accuracies(
                self.lm, self.lm.load_block, self.own, folder=place, on_progress=partial(_tell, 1)
            )
            scores += [own_score(name, one) for name, one in found.items()]
        if self.others is not None:
            say({"doing": "asking lm-eval's questions"})
            config = self.config
            free = partial(free_for_blocks, config, self.lm.device, detect(place, "cpu"))
            means = Means(
                folder=place,
                batch_size=config.evaluation.batch_size,
                free_for_blocks=free,
                on_progress=partial(_tell, 1),
            )
            scores += ask(self.others, answering(self.lm, self.encoder, self.lm.load_block, means))
        return scores


def _within_reach(config: RunConfig, lm: CausalLM, how: How, warnings: list[str]) -> RunConfig:
    """``config`` with a context that the model can read: the one that was asked for, else at most as many
    tokens as it was made for.

    Raises:
        PreflightError: where the model has no positions for what was asked for.
    """
    length = config.evaluation.sequence_length
    reach = getattr(text_config(lm.model.config), "max_position_embeddings", None)
    reach = reach if isinstance(reach, int) and reach > 1 else length
    if how.sequence_length is None:
        length = min(length, reach)
    table = lm.position_table
    if table is not None and length > table.rows:
        raise table.refusal("--sequence-length", length)
    if length > reach:
        warnings.append(f"windows of {length} are longer than the {reach} positions the model was made for")
    section = msgspec.structs.replace(config.evaluation, sequence_length=length)
    return msgspec.structs.replace(config, evaluation=section)


def windows_of(config: RunConfig, encoder: Encoder, warnings: list[str]) -> list[Tensor]:
    """Of each text."""
    section = config.evaluation
    return [
        token_windows(
            encoder,
            data,
            "evaluation",
            sequences=section.windows,
            length=section.sequence_length,
            warn=lambda _, message: warnings.append(message),
        )
        for data in section.every_text()
    ]


def require_comparable(lm: CausalLM, other: CausalLM, name: str) -> None:
    """PreflightError unless what both predict, and what they compute on the way, can be compared."""
    for what, ours, theirs in (
        ("blocks", lm.blocks, other.blocks),
        ("hidden states", lm.hidden_size, other.hidden_size),
        ("tokens", lm.vocab_size, other.vocab_size),
    ):
        if ours != theirs:
            raise PreflightError(
                f"it has {theirs} {what}, and the checkpoint {ours}",
                where=name,
                hint="name the model that the checkpoint was made from",
            )


def _read(
    config: RunConfig,
    opened: Opened,
    full: Opened | None,
    windows_NT: Tensor,
    given: int,
    warnings: list[str],
) -> Measurement:
    """Half as many windows at a time as long as memory does not suffice."""
    lm, batch = opened.lm, config.evaluation.batch_size
    streams = windows_NT.numel() * lm.hidden_size * lm.dtype.itemsize * (1 if full is None else 2)
    place = token_cache().parent  # of a user's own disk, which a folder for what is temporary need not be on
    make_folder(place)
    budget = host_budget(config, detect(place, "cpu")) // 2
    kind: StoreKind = "host" if streams <= budget else "disk"
    while True:
        try:
            return read(
                opened.version,
                full.version if full is not None else None,
                windows_NT,
                given=max(1, given),
                batch_size=batch,
                store_kind=kind,
                store_paths=(place / "eqat-evaluation-full.bin", place / "eqat-evaluation.bin"),
                store_budget_bytes=budget,
                on_progress=partial(_tell, len(windows_NT)),
            )
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()
        warnings.append(f"out of memory; evaluated with {batch} windows at a time")


def _tell(windows: int, done: int, of: int) -> None:
    # A line a window would be more than anybody reads.
    if done == of or (done * 200) // of != ((done - windows) * 200) // of or windows < 50:
        say({"done": done, "of": of})


def say(tree: dict[str, Any]) -> None:
    """A line for whoever started this; where nobody reads any more, nothing more is to be measured."""
    try:
        print(json.dumps(tree), flush=True)
    except BrokenPipeError:
        os._exit(int(ExitCode.ABORTED))


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asked is told by whoever started this
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=MeasureRequest)
    try:
        load_extensions()
        say(measure(request))
    except EqatError as error:
        return _refused(by_flags(error))
    except (MemoryError, torch.OutOfMemoryError):
        return _refused(
            EqatError(
                "memory ran out",
                exit_code=ExitCode.OUT_OF_MEMORY,
                where=request.source,
                hint="a shorter --sequence-length needs less",
            )
        )
    return int(ExitCode.DONE)


def _refused(error: EqatError) -> int:
    said = {"message": error.message, "where": error.where, "hint": error.hint}
    say({"error": {**said, "exit_code": int(error.exit_code)}})
    return int(error.exit_code)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of libraries, and what they do when Python ends, are of no interest
