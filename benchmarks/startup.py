"""How long a run takes from its launch to its first training step.

    python benchmarks/startup.py Llama-2-7B

Writes a model of random weights (bfloat16, a file a block), a tokenizer and a text of random words to a local
disk, runs it like any other (`eqat run`) and stops it after its first metric; three times, with nothing in
any cache of tokens or compiled code. Everything that a run does before is in it: opening the model, drawing
and tokenizing the text, perplexity at full precision, the full-precision stream through the first block,
its ranges, and compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from common import DEVICE, SHAPES, median_of, table, where
from recipe import BLOCKS

WORDS = 20_000
TEST_WORDS = 245_000
"""166 windows of 2048 tokens, as WikiText-2's test split has for Llama."""
EQAT = (sys.executable, "-m", "eqat_tui")


def write_model(folder: Path, shape: str, blocks: int, vocabulary: int) -> None:
    """A checkpoint as a hub would hold it: one file for each block, one for the rest, and their index."""
    config = LlamaConfig(
        num_hidden_layers=blocks, vocab_size=vocabulary, max_position_embeddings=4096, **SHAPES[shape]
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        whole = LlamaForCausalLM(config)
    index: dict[str, str] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in whole.named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        file = f"model-{part}.safetensors"
        index[name] = file
        spread = parameter.shape[-1] ** -0.5
        value = (
            torch.randn(parameter.shape, device=DEVICE) * spread
            if parameter.ndim > 1
            else torch.ones(parameter.shape)
        )
        files.setdefault(file, {})[name] = value.to(torch.bfloat16).cpu()
        if len(files) > 1 and part != "outer":  # the block before is complete
            for done in [other for other in files if other not in (file, "model-outer.safetensors")]:
                save_file(files.pop(done), folder / done, metadata={"format": "pt"})
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_text(path: Path, words: int) -> list[str]:
    """Paragraphs of made-up words; returns the words."""
    drawn = random.Random(0)
    made = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(2, 9))) for _ in range(WORDS)]
    with path.open("w") as file:
        for _ in range(words // 200):
            file.write(" ".join(drawn.choices(made, k=200)) + "\n\n")
    return made


def write_tokenizer(folder: Path, made: list[str], vocabulary: int) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, WORDS), special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([" ".join(made)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def eqat(*arguments: str) -> None:
    subprocess.run([*EQAT, *arguments], check=False, stdout=subprocess.DEVNULL)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    path = next(run_dir.glob("*/events.jsonl"), None)
    if path is None:
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def launch(command: list[str], place: Path, limit: float) -> dict[str, float]:
    """Seconds of everything before the first step of a run, for which nothing is cached."""
    runs = place / "runs"
    caches = ("EQAT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    place.mkdir()
    launched = time.time()
    with (place / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--runs-dir", str(runs)],
            stdout=out,
            stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **{name: str(place / name) for name in caches}},
        )
        first, told = None, 0
        while first is None and process.poll() is None and time.time() < launched + limit:
            time.sleep(0.25)
            seen = read_events(runs)
            first = next((e for e in seen if e["kind"] == "metric" and e["phase"] == "block_ap"), None)
            for event in seen[told:]:
                if event["kind"] in ("run.started", "phase.started", "block.started"):
                    what = f"{event['kind']} {event.get('phase', '')}"
                    print(f"{event['t'] - launched:6.1f} s  {what}", file=sys.stderr, flush=True)
            told = len(seen)
        if process.poll() is None:  # what it has trained is not wanted
            eqat("stop", "latest", "--kill", "--runs-dir", str(runs))
        process.wait(60)
    if first is None:
        sys.exit((place / "out").read_text()[-2000:])
    seen = read_events(runs)

    def at(kind: str, phase: str | None = None) -> float:
        return next(e["t"] for e in seen if e["kind"] == kind and (phase is None or e["phase"] == phase))

    took = {"starting Python, planning": at("run.started") - launched}
    for event in seen:
        if event["kind"] == "phase.finished" and event["t"] < first["t"]:
            took[event["phase"]] = event["seconds"]
    took["Block-AP until its first block"] = at("block.started") - at("phase.started", "block_ap")
    took[f"its stream, ranges and compiling, until the metric of step {first['step']}"] = first["t"] - at(
        "block.started"
    )
    took["from launch to the first step"] = first["t"] - launched
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shape", nargs="?", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--words", type=int, default=6_000_000)
    parser.add_argument("--set", action="append", dest="changes", default=[])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which it is given up")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        blocks = args.blocks or BLOCKS.get(args.shape, 2)
        write_model(folder, args.shape, blocks, args.vocabulary)
        write_tokenizer(folder, write_text(Path(name) / "text.txt", args.words), args.vocabulary)
        write_text(Path(name) / "test.txt", TEST_WORDS)
        changes = [
            f"data.source={name}/text.txt",
            f"evaluation.data.source={name}/test.txt",
            *args.changes,
        ]
        command = [*EQAT, "run", args.preset, "--model", str(folder)]
        command += [flag for change in changes for flag in ("--set", change)]
        took = [launch(command, Path(name) / str(turn), args.limit) for turn in range(args.repeat)]
    table(
        f"{args.shape}, {blocks} blocks | seconds",
        [[what, median_of([each[what] for each in took], ".1f")] for what in took[0]],
    )
    print(f"{' '.join(args.changes)} {where()}")


if __name__ == "__main__":
    main()
