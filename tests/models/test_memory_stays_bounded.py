"""Streaming a checkpoint block by block never brings more than about one block into memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from engine.models.skeleton import build_skeleton

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

STREAM = """
import json, sys, threading
import torch
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.config.model import ModelConfig

def resident():
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return [int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

torch.set_num_threads(1)
lm = CausalLM(ModelSource.open(ModelConfig(source=sys.argv[1])), torch.device("cpu"), torch.bfloat16)
hidden = lm.embed(torch.arange(16).reshape(1, 16))
with torch.no_grad():
    hidden = lm.run_block(lm.load_block(0), 0, hidden)  # the libraries' own buffers exist from here on
    before, peak, done = resident(), [0, 0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[:] = map(max, peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    finite = bool(lm.head(hidden).isfinite().all())
    done.set()
    watcher.join()
print(json.dumps({"anonymous": peak[0] - before[0], "mapped": peak[1] - before[1], "finite": finite}))
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """300 MB of random bfloat16 weights, a shard for every two layers."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    values = torch.randn(1024 * 2816).mul_(0.02).bfloat16()
    for name, parameter in build_skeleton(config, torch.bfloat16).named_parameters():
        layer = int(name.split(".")[2]) // 2 if "layers" in name else 6
        tensor = values[: parameter.numel()].reshape(parameter.shape).clone()
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's own count of pages")
def test_streaming_300_megabytes_needs_little_more_than_a_block(checkpoint: Path) -> None:
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert stored > 290 * MIB
    # Every array its own mapping, given back when it is freed: otherwise the heap's fragments are counted
    # too, which differ from run to run by up to a block and a half.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **allocator, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", STREAM, str(checkpoint)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    grown = json.loads(result.stdout.splitlines()[-1])
    block = stored // 12
    assert grown["finite"]
    assert grown["anonymous"] < 2 * block, f"{grown['anonymous'] / MIB:.0f} MiB beyond the first block"
    assert grown["mapped"] < 0.5 * block, "the checkpoint must not stay mapped"
