"""What is mutated: runs in every state, a model as a folder and as a GGUF file, texts, configurations.

Made once for each worker, by real engines, at the very paths where the cases will lie, since a run remembers
where its model is. Everything but the times and the losses' clocks is the same every time.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import binaries
from engine_runs import SMALL, exported, local_model
from world import NEIGHBOUR, VICTIM, World, furnish

from engine.config.loading import load
from engine.config.writing import to_toml
from engine.run import control, event_log, events, housekeeping
from engine.run.directory import RunDirectory

COMMITS = {"stopped": 3, "crashed": 5}
"""After how many checkpoints the engine is stopped or killed."""
PARAGRAPH = "The river was high that spring, and the ferry did not go for eleven days. "


def build(template: Path, world: World) -> None:
    """Make everything, in this process's children; ``template`` then holds what a case is copied from."""
    furnish(world)
    in_a_child(lambda: _model_files(world))
    _texts(world)
    _configs(world)
    for state, code in (("finished", 0), ("stopped", 75), ("crashed", -signal.SIGKILL)):
        os.environ["EQAT_CACHE_DIR"] = str(world.cache)
        run = _new_run(world, VICTIM)
        ended = in_a_child(lambda run=run, state=state: _engine(run, COMMITS.get(state), state == "crashed"))
        assert ended == code, f"the {state} run ended with {ended}"
        if state == "finished":
            neighbour = RunDirectory(Path(shutil.copytree(run.path, world.runs / NEIGHBOUR)))
            housekeeping.clean_run(neighbour)
            (template / "reference.json").parent.mkdir(exist_ok=True)
            (template / "reference.json").write_text(json.dumps(exported(run)))
        run.path.rename(template / state)
    shutil.copytree(world.root, template / "world")


def in_a_child(action: Any) -> int:
    """Run ``action`` in a forked process; its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = action() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _new_run(world: World, name: str) -> RunDirectory:
    run = RunDirectory.create(world.runs, load("smoke", overrides=SMALL))
    return RunDirectory(run.path.rename(world.runs / name))


def _engine(run: RunDirectory, commits: int | None, kill: bool) -> int:
    """An attempt that is stopped, or killed, after so many checkpoints."""
    from engine.__main__ import main

    seen = 0
    emit = event_log.EventWriter.emit

    def count(writer: event_log.EventWriter, event: events.Event) -> None:
        nonlocal seen
        emit(writer, event)
        seen += isinstance(event, events.CheckpointCommitted)
        if isinstance(event, events.CheckpointCommitted) and seen == commits:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            control.request(run, "stop")

    event_log.EventWriter.emit = count  # type: ignore[method-assign]
    return main([str(run.path)])


# -- models --------------------------------------------------------------------------------------------


def _model_files(world: World) -> int:
    import gguf_files
    import tiny
    from tokenizers.pre_tokenizers import ByteLevel

    local_model(world.model)
    written = gguf_files.write(world.gguf, "llama2")
    size = tiny.model("llama2").config.vocab_size
    tokens = [*sorted(ByteLevel.alphabet()), *(f"<{index}>" for index in range(size))][:size]
    array = struct.pack("<IQ", binaries.STRING, size) + b"".join(map(binaries.text, tokens))
    kinds = struct.pack("<IQ", 5, size) + struct.pack(f"<{size}i", *([1] * size))
    written.write_bytes(
        binaries.with_pairs(
            written.read_bytes(),
            [
                binaries.pair("tokenizer.ggml.model", binaries.STRING, binaries.text("gpt2")),
                binaries.pair("tokenizer.ggml.tokens", binaries.ARRAY, array),
                binaries.pair("tokenizer.ggml.token_type", binaries.ARRAY, kinds),
                binaries.pair(
                    "tokenizer.ggml.merges", binaries.ARRAY, struct.pack("<IQ", binaries.STRING, 0)
                ),
            ],
        )
    )
    return 0


# -- texts and configurations --------------------------------------------------------------------------


def _texts(world: World) -> None:
    """A text in every format that is read, and a folder of them with parts of their own."""
    import pyarrow
    import pyarrow.parquet

    paragraphs = [f"{number}. {PARAGRAPH * 6}\n" for number in range(40)]
    text, lines = "\n".join(paragraphs), "".join(json.dumps({"text": part}) + "\n" for part in paragraphs)
    place = world.texts
    (place / "a.txt").write_text(text)
    (place / "a.jsonl").write_text(lines)
    (place / "a.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (place / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    for name in ("a.txt.zst", "a.jsonl.zst"):
        with pyarrow.output_stream(str(place / name), compression="zstd") as file:
            file.write((text if ".txt" in name else lines).encode())
    table = pyarrow.table({"text": paragraphs, "id": list(range(len(paragraphs)))})
    pyarrow.parquet.write_table(table, place / "a.parquet")
    with (
        pyarrow.OSFile(str(place / "a.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    folder = place / "folder"
    for part in ("train", "validation", "test"):
        (folder / part).mkdir(parents=True)
        (folder / part / "one.txt").write_text(text)
        (folder / part / "two.jsonl").write_text(lines)


def _configs(world: World) -> None:
    """A configuration that says everything, one that extends another, and one that is short."""
    config = load("smoke", overrides=SMALL)
    (world.configs / "whole.toml").write_text(to_toml(config))
    (world.configs / "base.toml").write_text('extends = "smoke"\n[grid]\nbits = 3\n')
    (world.configs / "child.toml").write_text('extends = "base.toml"\n[block_ap]\nepochs = 1\n')
    text = (
        f'extends = "smoke"\n[model]\nsource = "{world.model}"\n[data]\nsource = "{world.texts / "a.txt"}"\n'
    )
    (world.configs / "local.toml").write_text(text)
