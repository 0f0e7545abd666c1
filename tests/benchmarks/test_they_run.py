"""Every script of benchmarks/ that wants a GPU also runs without one, on a block of no size: a mistake in one
should not be found on a machine that is paid for by the minute."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

COMMANDS = [
    "block_step tiny --steps 3 --repeat 1 --variants plain",
    "e2e_step tiny --length 16 --vocabulary 300 --steps 6 --repeat 1 --forms plain --loss kl --profile",
    "recipe tiny --sequences 4 --validation 2 --length 16 --store disk --vocabulary 300 --windows 4"
    " --e2e-length 16 --profile",
    "evaluation tiny --blocks 2 --windows 5 --length 16 --vocabulary 300 --repeat 1",
    "telemetry tiny --steps 16 --repeat 1",
    "end_to_end random://tiny-llama --own-text --sequences 4 --val-sequences 2 --length 32 --windows 4"
    " --group-size 32 --held-out builtin --rounded --block-ap epochs=1 --try e2e_qp --try e2e_qat"
    " --try lr_qat",
    "several_gpus --shape tiny --gpus 2 --repeat 1 --what block qat",
    "methods --shape tiny --repeat 1",
    "servers tiny --rows 1 --bits 3 --groups 64",
    "startup tiny --blocks 2 --vocabulary 700 --words 4000 --preset smoke --repeat 1",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_it_prints_a_table(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "DEVICE", torch.device("cpu"))
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("| ")]
    assert len(heads) >= 2
    assert all(line.count("|") == heads[-1].count("|") for line in heads[-2:])
    assert "torch" in lines[-1]
