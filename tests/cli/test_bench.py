"""``eqat bench``: exports are really loaded and timed, and what cannot be is a row that says so."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from cli_tools import Eqat, story
from engine_runs import make_run, run_here

from engine.bench import measuring
from engine.bench.__main__ import _answer
from engine.bench.prompt import prompt_tokens
from engine.config.formats import FORMATS
from engine.config.loaders import LOADERS, loaders_of, unread
from engine.config.tables import load_named
from engine.errors import EqatError, PreflightError
from engine.run.benched import Measured, Request, benched, keep
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.lock import RunLock
from engine.run.shown import show_run
from eqat_tui import benching
from eqat_tui.bench_text import measured_table
from eqat_tui.run_text import report

FEW = ("--prompt-tokens", "12", "--new-tokens", "4")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A tiny model that was only rounded, in two formats."""
    place = tmp_path_factory.mktemp("bench")
    untrained = {"block_ap.enabled": False, "e2e_qp.enabled": False, "evaluation.enabled": False}
    run = make_run(place / "runs", {**untrained, "export.formats": ["compressed-tensors", "gptq_v2"]})
    assert run_here(run) == 0
    return run


@pytest.fixture
def copied(exported: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(exported.path, tmp_path / "runs" / exported.id))


def rows_of(answer: str) -> dict[str, dict[str, object]]:
    return {row["loader"]: row for row in json.loads(answer)["rows"]}


def test_a_run_is_measured_at_16_bits_and_kept_beside_it(eqat: Eqat, copied: RunDirectory) -> None:
    """One real measurement: two or three processes that load PyTorch, one after the other."""
    answer = eqat("bench", "latest", *FEW, "--json", OMP_NUM_THREADS="1")
    found = json.loads(answer.stdout)
    row, packed = found["rows"]
    assert (row["loader"], row["format"], row["status"]) == ("transformers", "gptq_v2", "measured")
    assert (row["prompt_tokens"], row["new_tokens"], row["threads"], row["repeats"]) == (12, 4, 1, 5)
    assert row["prefill"] > 0
    assert row["decode"] > 0
    assert row["precision"] == "bfloat16"
    assert row["file_bytes"] == (copied.export_dir / "gptq_v2" / "model.safetensors").stat().st_size
    # The libraries alone are some hundred MiB; a model of a megabyte is next to nothing.
    assert row["model_bytes"] < row["peak_bytes"]
    assert row["peak_bytes"] > 2**26
    assert found["unread"] == ["compressed-tensors"]
    assert packed["loader"] == "gptqmodel"
    if find_spec("gptqmodel") is None:
        # An export as it is packed was asked for, and none was measured.
        assert (packed["status"], packed["problem"]) == ("missing", "gptqmodel is not installed")
        assert packed["hint"] == "pip install gptqmodel optimum"
        assert answer.returncode == 3
    kept = benched(copied)[0]
    assert (kept.loader, kept.format, kept.decode) == ("transformers", "gptq_v2", row["decode"])
    shown = show_run(copied)
    assert shown["bench"][0]["decode"] == row["decode"]
    assert "transformers, 16 bits" in report(shown)
    assert eqat("rm", "latest", "--yes").returncode == 0
    assert not copied.path.exists()  # what was kept is known to be the run's


def scripted(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of Python, a shell that is told the request."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nrequest=$(cat)\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_loader_that_crashes_is_a_row_and_hides_no_other(
    copied: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works = msgspec.json.encode({"measured": one("gptqmodel", "gptq_v2"), "tokens": [1]}).decode()
    body = f"""
        case "$request" in
            *'"loader":""'*) echo words of a library; echo '{{"prompt": [1, 2]}}' ;;
            *'"loader":"transformers"'*) kill -SEGV $$ ;;
            *) echo '{works}' ;;
        esac
    """
    scripted(body, tmp_path, monkeypatch)
    monkeypatch.setattr(benching, "find_spec", lambda name: object())
    asked = {"prompt_tokens": 12, "new_tokens": 4, "device": "cpu"}
    found = benching.bench(copied, ["gptq_v2"], heard=lambda words: None, **asked)
    first, second = found["rows"]
    assert (first["status"], first["problem"]) == ("failed", "its process crashed with SIGSEGV")
    assert (second["status"], second["agreement"], second["compared_with"]) == ("measured", None, None)
    assert benching.outcome(found) == 0
    assert [each.loader for each in benched(copied)] == ["gptqmodel"]
    shutil.rmtree(copied.eval_dir)
    copied.eval_dir.touch()
    told: list[str] = []
    again = benching.bench(copied, ["gptq_v2"], heard=told.append, **asked)
    assert again["rows"] == found["rows"], "what cannot be kept is lost"
    assert told[-1].startswith("warning: what was measured is not kept in the run: ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("kill -KILL $$", "its process was killed, often by the kernel for want of memory"),
        ("echo oh no >&2; exit 7", "its process ended with 7: oh no"),
    ],
)
def test_a_process_that_dies_is_told_by_how_it_died(
    body: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(body, tmp_path, monkeypatch)
    request = Request(format="hf", folder=str(tmp_path), run="", prompt_tokens=4, new_tokens=4)
    with pytest.raises(EqatError, match=words):
        benching._asked(request, lambda heard: None, "measured")


def request_of(run: RunDirectory, **changes: object) -> Request:
    asked = {"format": "gptq_v2", "folder": str(run.export_dir / "gptq_v2"), "run": str(run.path)}
    return Request(**{**asked, "prompt_tokens": 12, "new_tokens": 4, **changes})  # type: ignore[arg-type]


def test_all_loaders_read_the_same_prompt_of_real_text(exported: RunDirectory) -> None:
    prompt = prompt_tokens(request_of(exported))
    assert len(prompt) == 12
    assert prompt == prompt_tokens(request_of(exported, format="gguf"))  # by the run's own model
    assert len(set(prompt)) > 6


def test_more_tokens_than_the_model_reads_are_refused(exported: RunDirectory) -> None:
    with pytest.raises(PreflightError, match="the model reads at most"):
        prompt_tokens(request_of(exported, prompt_tokens=100_000))


def test_files_that_are_damaged_are_told_by_name(copied: RunDirectory) -> None:
    (copied.export_dir / "gptq_v2" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(EqatError, match=r"model\.safetensors: cannot be read"):
        _answer(request_of(copied, loader="transformers", device="cpu", prompt=(1, 2, 3)))


MISTAKES = [
    (("bench", "latest", "--format", "no-such"), "there is no format 'no-such'"),
    (("bench", "latest", "--format", "mlx"), "has no export in the format mlx"),
    (("bench", "latest", "--prompt-tokens", "0"), "--prompt-tokens"),
    (("bench", "latest", "--new-tokens", "1"), "--new-tokens"),
    (("bench", "latest", "--device", "abacus"), "runtime.device"),
    (("bench", "nobody"), "nobody"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(one[0][1:]) for one in MISTAKES])
def test_a_mistake_is_told_before_anything_is_loaded(
    arguments: tuple[str, ...], words: str, eqat: Eqat, copied: RunDirectory
) -> None:
    answer = eqat(*arguments)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_a_run_without_an_export_says_how_to_write_one(eqat: Eqat, finished_run: RunDirectory) -> None:
    answer = eqat("bench", "latest")
    assert answer.returncode == 2
    assert f"has no export (eqat export {finished_run.id} --format" in answer.stderr


# -- the table of loaders ------------------------------------------------------------------------------


def test_every_loader_reads_formats_that_exist_and_has_code() -> None:
    for loader in LOADERS:
        # A loader may know a format that only an extension, or another version, writes.
        assert set(loader.formats) <= {*FORMATS.names()}, loader.name
        assert loader.install.startswith("pip install "), loader.name
        module = loader.code.partition(":")[0].replace(".", "/") + ".py"
        assert (Path(__file__).parents[2] / module).is_file(), loader.name
    for name in ("transformers", "gptqmodel", "auto-round"):  # those whose libraries are here
        assert load_named(LOADERS[name].code)


def test_16_bits_come_first_from_the_plainest_export_and_once() -> None:
    def chosen(*formats: str) -> list[tuple[str, str]]:
        return [(loader.name, name) for loader, name in loaders_of(formats)]

    assert chosen("mlx", "gptq_v2", "hf") == [
        ("transformers", "hf"),
        ("gptqmodel", "gptq_v2"),
        ("mlx-lm", "mlx"),
    ]
    assert chosen("compressed-tensors") == [("transformers", "compressed-tensors")]
    assert chosen() == []
    assert unread(["hf", "mlx", "compressed-tensors"]) == ["compressed-tensors"]


# -- measuring -----------------------------------------------------------------------------------------


class Counting:
    """A model that predicts the successor of each token, and one time in four something else."""

    device, precision = "cpu", ""

    def __init__(self, errs: bool = False) -> None:
        self.fed: list[int] = []
        self.errs = errs

    def prefill(self, prompt: tuple[int, ...]) -> int:
        self.fed = []
        return prompt[-1] + 1

    def decode(self, token: int) -> int:
        self.fed.append(token)
        return 0 if self.errs and len(self.fed) == 3 else token + 1


def measured(model: Counting, forced: tuple[int, ...] = ()) -> tuple[Measured, list[int]]:
    folder = str(Path(__file__).parent)
    request = Request(
        loader="mlx-lm",
        format="mlx",
        folder=folder,
        run="",
        prompt=(5, 6, 7),
        forced=forced,
        prompt_tokens=3,
        new_tokens=5,
    )
    loader = LOADERS["mlx-lm"]
    return measuring.measure(loader, lambda: model, request, measuring.HostMemory(), threads=1)


def test_a_token_that_differs_does_not_make_those_after_it_differ() -> None:
    first, tokens = measured(Counting())
    assert tokens == [8, 9, 10, 11, 12]
    assert first.agreement is None
    model = Counting(errs=True)
    second, found = measured(model, forced=tuple(tokens))
    assert found == [8, 9, 10, 0, 12]
    assert model.fed == [8, 9, 10, 11]
    assert second.agreement == 0.8


def test_a_slow_model_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(Counting())[0].repeats == measuring.REPEATS
    monkeypatch.setattr(measuring, "ENOUGH_S", 0.0)
    assert measured(Counting())[0].repeats == measuring.FEWEST


# -- what is kept --------------------------------------------------------------------------------------


def one(loader: str = "mlx-lm", format: str = "mlx", decode: float = 10.0, device: str = "cpu") -> Measured:
    return Measured(
        loader=loader,
        format=format,
        device=device,
        prefill=100.0,
        decode=decode,
        repeats=5,
        prompt_tokens=128,
        new_tokens=32,
        threads=2,
        load_seconds=1.0,
    )


def test_a_new_measurement_replaces_its_own_and_leaves_the_others(
    new_run: Callable[[], RunDirectory],
) -> None:
    run = new_run()
    keep(run, [one(), one("llama-cpp", "gguf")])
    keep(run, [one(decode=20.0)])
    assert {(each.loader, each.decode) for each in benched(run)} == {("mlx-lm", 20.0), ("llama-cpp", 10.0)}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"results": [{"loader": 1}]}', b"\xff\xfe", b'{"results": [{"decode": -1}]}']
)
def test_a_file_that_is_none_of_ours_shows_nothing(content: bytes, finished_run: RunDirectory) -> None:
    (finished_run.eval_dir / "bench.json").write_bytes(content)
    assert benched(finished_run) == []
    assert "1.3×" in report(show_run(finished_run))


def test_only_what_computes_on_the_same_device_is_compared_in_speed() -> None:
    rows = [
        msgspec.to_builtins(each)
        for each in (
            one("transformers", "hf", decode=5.0),
            one("llama-cpp", "gguf", decode=20.0),
            one(decode=30.0, device="gpu"),
        )
    ]
    head, first, second, third, note = measured_table(rows).splitlines()
    assert "×" not in first
    assert "4×" in second
    assert "×" not in third
    assert "128 tokens and 32 new ones" in note
    assert "new/s" in head


def test_a_run_that_an_engine_works_on_is_not_measured(
    eqat: Eqat, new_run: Callable[[], RunDirectory]
) -> None:
    run = new_run()
    with EventWriter(run.events_path, 1) as writer:
        for event in story(run)[:4]:
            writer.emit(event)
    (run.export_dir / "hf").mkdir()
    with RunLock(run.lock_path):
        answer = eqat("bench", "latest")
    assert answer.returncode == 3
    assert "an engine works on it" in answer.stderr
