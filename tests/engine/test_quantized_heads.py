"""Whole runs whose embedding and head are quantized: what is measured is what is exported, and training is
what it is without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import change, exported, failure, of, output, run_here
from test_older_checkpoints import as_before

from engine.config.derived import resolve
from engine.config.loading import load, load_run
from engine.config.sameness import config_hash
from engine.config.writing import to_toml
from engine.evaluation.measurement import read
from engine.evaluation.perplexity import perplexity
from engine.export.layout import form_of
from engine.phases import evaluation
from engine.plan.plan import make_plan
from engine.run import events, generations
from engine.run.directory import RunDirectory
from engine.run.facts import HEAD
from engine.run.generations import Generation
from engine.run.objects import object_path
from engine.run.redo import make_redo

Make = Callable[..., RunDirectory]
QUANTIZED: dict[str, object] = {"grid.head_bits": 4, "export.formats": ["mlx", "gguf"]}
PLAIN: dict[str, object] = {"export.formats": ["mlx", "gguf"]}


def newest(run: RunDirectory) -> Generation:
    place = run.checkpoints_dir
    return generations.read_generation(place, generations.newest(place))


def measured(run: RunDirectory) -> dict[str, float | None]:
    return {found.stage: found.perplexity for found in of(run, events.Eval)}


def tensors_of(run: RunDirectory) -> str:
    """The digest of the tensors of its MLX export: the card also says which formats were asked for."""
    return exported(run, "mlx")["model.safetensors"]


def test_the_figures_of_a_run_are_those_of_its_files(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noted(version: Any, full: Any, windows_NT: torch.Tensor, **options: Any) -> Any:
        seen.append((windows_NT, options["given"]))
        return read(version, full, windows_NT, **options)

    monkeypatch.setattr(evaluation, "read", noted)
    run = make(**QUANTIZED)
    assert run_here(run) == 0, output(run)
    windows, given = seen[-1]
    found = measured(run)
    for name in ("mlx", "gguf"):
        lm = form_of(name).open(run.export_dir / name, torch.device("cpu"), torch.float32)
        again = perplexity(lm, lm.load_block, windows, given=given).perplexity
        # Their gguf rounds the biases of the head's groups.
        assert again == pytest.approx(found["e2e_qp"], rel=1e-6 if name == "mlx" else 1e-2), name
    assert {done.format: done.verified for done in of(run, events.Export)} == dict.fromkeys(
        ("mlx", "gguf"), True
    )


def test_what_is_trained_is_what_it_is_without(finished_once: Make) -> None:
    quantized, plain = finished_once(**QUANTIZED), finished_once(**PLAIN)
    one, other = newest(quantized).entries, newest(plain).entries
    assert one.keys() - other.keys() == {HEAD}
    assert {name: digest for name, digest in one.items() if name != HEAD} == dict(other)
    with_head, without = measured(quantized), measured(plain)
    assert with_head["fp"] == without["fp"]
    assert all(with_head[stage] != without[stage] for stage in ("rtn", "block_ap", "e2e_qp"))
    (plan,) = [event.plan for event in of(quantized, events.Plan)]
    assert plan["head"].startswith("the embedding, which is the head too, at 4 bits, groups of 32: ")
    sizes = {done.format: done.bytes for done in of(quantized, events.Export)}
    larger = {done.format: done.bytes for done in of(plain, events.Export)}
    assert sizes["mlx"] < larger["mlx"]
    assert sizes["gguf"] < larger["gguf"]


def test_a_head_that_is_damaged_is_rounded_again_to_the_same_bytes(finished_copy: Make) -> None:
    run = finished_copy(**QUANTIZED)
    whole = tensors_of(run)
    path = object_path(run.checkpoints_dir, newest(run).entries[HEAD])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_here(run, "--task", "export", "--format", "mlx") == 0, output(run)
    warned = [event.message for event in of(run, events.Warning) if event.code == "checkpoint"]
    assert any("the rounding of embedding and head" in message for message in warned), warned
    assert tensors_of(run) == whole


def test_a_stopped_run_goes_on_with_the_head_that_it_has(make: Make, finished_once: Make) -> None:
    """Rounded before anything else, and not again: on another machine its last bits might be others."""
    run = make(**QUANTIZED)
    whole = finished_once(**QUANTIZED)
    assert run_here(run) == 0, output(run)
    as_before(run, (), blocks=2)  # nothing but two blocks, as after a kill
    assert HEAD not in newest(run).entries
    assert run_here(run) == 0, output(run)
    assert newest(run).entries[HEAD] == newest(whole).entries[HEAD]
    assert exported(run, "mlx") == exported(whole, "mlx")
    committed = [e for e in of(run, events.CheckpointCommitted) if e.phase == "prepare"]
    assert len(committed) == 2, "once by each attempt that had none"


def test_a_part_done_again_and_a_sample_have_the_head_too(finished_copy: Make) -> None:
    run = finished_copy(**QUANTIZED)
    made = make_redo(run, 3, {"block_ap.epochs": 2})
    assert run_here(made) == 0, output(made)
    assert newest(made).entries[HEAD] == newest(run).entries[HEAD]
    assert run_here(run, "--task", "generate", "--prompt", "once", "--new-tokens", "3") == 0, output(run)
    assert [sample.problem for sample in of(run, events.Sample)] == ["", ""]


def test_another_format_is_refused_before_an_engine_loads_anything(finished_copy: Make) -> None:
    run = finished_copy(**QUANTIZED)
    assert run_here(run, "--task", "export", "--format", "gptq_v2") == 3
    (error,) = of(run, events.Error)
    assert "cannot hold an embedding and a head of 4 bits" in error.message


# -- runs without it -----------------------------------------------------------------------------------


def test_a_run_that_leaves_them_alone_says_nothing_of_it(finished_once: Make, tmp_path: Path) -> None:
    run = finished_once(**PLAIN)
    assert "head_bits" not in run.config_toml.read_text()
    assert "grid.head_bits" not in newest(run).identity
    assert HEAD not in newest(run).entries
    config = load("smoke")
    quantized = load("smoke", overrides={"grid.head_bits": 8})
    assert "head_bits" not in to_toml(config)
    assert config_hash(config) == config_hash(load("smoke", overrides={"grid.head_bits": 0}))
    assert config_hash(config) != config_hash(quantized)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(resolve(quantized)))
    assert load_run(tmp_path).grid.head_bits == 8
    assert make_plan(config).head == ""
    assert "grid.head_bits" in json.dumps(newest(finished_once(**QUANTIZED)).identity)


@pytest.mark.parametrize(("before", "now"), [(0, 8), (4, 0)])
def test_a_run_goes_on_only_with_the_head_that_it_began_with(
    finished_copy: Make, before: int, now: int
) -> None:
    run = finished_copy(**(QUANTIZED if before else PLAIN))
    change(run, **{"grid.head_bits": now})
    assert run_here(run) == 8
    assert failure(run, 8).where == "grid.head_bits"
