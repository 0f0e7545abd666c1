"""What a run leaves on the disk, and what it does not do with what lies there."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import WEIGHTS, Child, failure, local_model, make_run, of, output, run_here, start
from safetensors.torch import load_file, save_file

from engine.architecture.headers import safetensors_header
from engine.checkpoints.streams import StoredStreams
from engine.errors import EqatError
from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.redo import make_redo
from engine.system.stamps import StampedFile

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

OFTEN = {
    "block_ap.epochs": 4,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
    "runtime.streams": "stored",
}
TEXT = {".log", ".md", ".txt", ".jinja"}
PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def check_is_data(path: Path) -> None:
    """The file is what its name says, and that is none of the kinds that hold code."""
    content = path.read_bytes()
    if path.suffix in (".json", ".done"):
        json.loads(content)
    elif path.suffix == ".jsonl":
        for line in content.splitlines(keepends=True):
            assert not line.endswith(b"\n") or json.loads(line), path  # a kill tears the last line
    elif path.suffix == ".toml":
        tomllib.loads(content.decode())
    elif path.suffix == ".safetensors":
        safetensors_header(StampedFile.of(path))
    elif path.suffix in TEXT:
        content.decode()
    elif path.name == "CURRENT":
        assert re.fullmatch(rb"[0-9]+ [0-9a-f]{64}\n", content), path
    elif path.name == "lock":
        int(content)
    else:
        half_written = re.fullmatch(r"\..+\.(tmp|partial)", path.name)
        assert half_written or re.fullmatch(r"streams-[0-9]{3}-(full|quantized)\.raw", path.name), path
    # The header of a safetensors file begins with its length, which may be any number.
    assert path.suffix == ".safetensors" or not content.startswith((*PICKLE, b"PK\x03\x04")), path
    assert not zipfile.is_zipfile(path), path


def is_inside_a_training(run: RunDirectory) -> bool:
    """Whether a checkpoint lies inside a training. On a disk that is slow for a moment it may be the only
    one, at its beginning: no more are taken than the time they cost allows."""
    return any(e.step is not None for e in of(run, events.CheckpointCommitted))


def test_checkpoints_and_caches_hold_no_pickles(
    make: Make, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("EQAT_CACHE_DIR", str(cache))
    run = make(**OFTEN)
    child = engine(run)
    child.until(lambda: is_inside_a_training(run) and list(run.cache_dir.glob("s*.raw")))
    child.send(signal.SIGKILL)
    child.code()
    killed, tokens = files(run.path), files(cache)
    kinds = {path.suffix for path in killed}
    assert {".safetensors", ".raw", ".jsonl", ".toml", ".json", ".log"} <= kinds
    assert {path.suffix for path in tokens} == {".safetensors"}
    for path in (*killed, *tokens):
        check_is_data(path)
    assert run_here(run) == 0
    for path in files(run.path, cache):
        check_is_data(path)


@pytest.mark.parametrize("kind", ["pickle", "zip", "torch"])
def test_the_check_finds_a_pickle_whatever_it_is_called(tmp_path: Path, kind: str) -> None:
    content = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"x": 1}, content)
    elif kind == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("x", "y")
    else:
        torch.save({"x": torch.zeros(1)}, content)
    names = (
        "a.json",
        "a.done",
        "a.jsonl",
        "a.toml",
        "a.safetensors",
        "a.log",
        "lock",
        "CURRENT",
        ".a.1.2.tmp",
    )
    for name in (*names, "streams-001-full.raw", "a.pt", "a.bin", "a"):
        (tmp_path / name).write_bytes(content.getvalue())
        with pytest.raises((AssertionError, ValueError, EqatError)):
            check_is_data(tmp_path / name)


# -- nothing in it is executed -------------------------------------------------------------------------

TRAPS = ("engine", "torch", "json", "numpy", "transformers", "sitecustomize", "usercustomize", "conftest")


def set_traps(folder: Path, code: str) -> None:
    """Files that Python, a test runner or a shell would run if it took this folder for its own."""
    for name in (*TRAPS, "tokenizer", "modeling", "__main__", "__init__"):
        (folder / f"{name}.py").write_text(code)
    (folder / "evil.pth").write_text(f"import os; {code}")
    (folder / "run.sh").write_text(f"#!{sys.executable}\n{code}")
    (folder / "run.sh").chmod(0o755)
    auto_map = {"AutoConfig": "modeling.C", "AutoTokenizer": ["tokenizer.T", "tokenizer.T"]}
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_text(json.dumps({"auto_map": auto_map, "model_type": "own"}))


def test_nothing_in_a_run_directory_is_executed(
    make: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make(**OFTEN)
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'a').write(__name__)\n"
    (run.checkpoints_dir / "objects").mkdir()
    (run.export_dir / "gptq_v2").mkdir()
    for folder in (run.path, *filter(Path.is_dir, run.path.rglob("*"))):
        set_traps(folder, code)
    monkeypatch.chdir(run.path)
    for interrupted in (True, False):  # a resumed run reads more of what lies there
        child = engine(run, module=True)
        if interrupted:
            child.until(lambda: is_inside_a_training(run))
            child.send(signal.SIGTERM)
        assert child.code() == (75 if interrupted else 0), output(run)
    assert run_state(run) == "done"
    assert not marker.exists(), marker.read_text()
    subprocess.run([sys.executable, "-c", "import engine"], check=True)
    assert marker.exists(), "the traps are none"


# -- who may read and write it -------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "forbidden"), [(0, stat.S_IWGRP | stat.S_IWOTH), (0o077, 0o077)])
def test_files_are_created_with_sane_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, forbidden: int
) -> None:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    model = local_model(tmp_path / "model")
    for file in model.iterdir():
        file.chmod(0o777)  # what is copied from it must not bring this along
    before = os.umask(umask)
    try:
        run = make_run(tmp_path / "runs", {**OFTEN, "model.source": str(model)})
        control.request(run, "stop")
        assert run_here(run) == 75
        os.umask(umask)  # the engine tightens it for the process it thinks it has for itself
        child = start(run)
        assert child.code() == 0, output(run)
        again = make_redo(run, 2, {"block_ap.epochs": 2})
        assert run_here(again) == 0
    finally:
        os.umask(before)
    for top in (tmp_path / "runs", tmp_path / "cache"):
        for path in [top, *top.rglob("*")]:
            mode = path.stat().st_mode
            assert not mode & forbidden, f"{path} {oct(mode)}"
            if path.is_file():
                assert not mode & 0o111, f"{path} is executable"


# -- no path leads out of it ---------------------------------------------------------------------------


PRECIOUS = "precious"


def test_an_export_that_is_a_link_is_replaced_and_what_lies_there_stays(make: Make, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = [elsewhere / name for name in ("text.txt", "streams.raw", "generation-000001.json")]
    for path in kept:
        path.write_text(PRECIOUS)
    run = make(**{"runtime.streams": "stored", "e2e_qp.enabled": False})
    link = run.export_dir / "gptq_v2"
    link.symlink_to(elsewhere)
    assert run_here(run) == 0
    assert [path.read_text() for path in kept] == [PRECIOUS] * len(kept)
    assert sorted(elsewhere.iterdir()) == sorted(kept)
    assert not link.is_symlink()


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/objects"])
def test_checkpoints_that_are_a_link_are_refused_in_one_line(make: Make, tmp_path: Path, place: str) -> None:
    run = make()
    (run.checkpoints_dir / "objects").mkdir()
    elsewhere = tmp_path / "elsewhere"
    (run.path / place).rename(elsewhere)
    (run.path / place).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    assert run_here(run) == 3
    error = failure(run, 3)
    assert error.where == str(run.path / place)
    assert "a link" in error.message
    assert sorted(elsewhere.rglob("*")) == before


def test_a_file_that_is_a_link_is_replaced_and_not_written_through(
    make: Make, engine: Engine, tmp_path: Path
) -> None:
    run = make(**{"e2e_qp.enabled": False})
    names = ("status.json", "launch.json", "logs/attempt-001.log", "checkpoints/CURRENT")
    for number, name in enumerate(names):
        elsewhere = tmp_path / f"elsewhere-{number}"
        elsewhere.write_text(PRECIOUS)
        (run.path / name).symlink_to(elsewhere)
    assert engine(run, module=True).code() == 0
    for number, name in enumerate(names):
        assert (tmp_path / f"elsewhere-{number}").read_text() == PRECIOUS, name


def test_settings_of_a_run_cannot_put_an_export_elsewhere(make: Make, tmp_path: Path) -> None:
    run = make()
    text = run.config_toml.read_text()
    assert '"gptq_v2"' in text
    run.config_toml.write_text(text.replace('"gptq_v2"', '"../../escaped"'))
    assert run_here(run) == 2
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("digest", ["../../x", "/etc/passwd"])
def test_a_run_whose_generations_name_files_elsewhere_cannot_be_continued(make: Make, digest: str) -> None:
    run = make(**{"e2e_qp.enabled": False})
    assert run_here(run) == 0
    for path in run.checkpoints_dir.glob("generation-*.json"):
        content = json.loads(path.read_bytes())
        content["entries"] = dict.fromkeys(content["entries"], digest)
        path.write_text(json.dumps(content))
    assert run_here(run) == 8
    assert "damaged" in failure(run, 8).message


# -- the model is the one it was -----------------------------------------------------------------------


def test_a_model_with_other_weights_of_the_same_size_is_refused(make: Make, tmp_path: Path) -> None:
    model = local_model(tmp_path / "model")
    run = make(**{"model.source": str(model), "e2e_qp.enabled": False})
    assert run_here(run) == 0
    tensors = load_file(model / WEIGHTS)
    name = sorted(tensors)[3]
    tensors[name] = tensors[name] + 1e-3
    size = (model / WEIGHTS).stat().st_size
    save_file(tensors, model / WEIGHTS)
    assert (model / WEIGHTS).stat().st_size == size
    assert run_here(run) == 8
    assert failure(run, 8).where == "model"


def test_stored_streams_lie_in_the_cache_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    """Their names come from the code; a border that is no number is refused."""
    stored = StoredStreams(1, [1, 1, 1], "torch.float32", {"full": "0" * 64}, 0, 0.0)
    assert stored.file(tmp_path, "full").parent == tmp_path
    with pytest.raises((TypeError, ValueError)):
        StoredStreams("../../x", [1, 1, 1], "torch.float32", {}, 0, 0.0).file(tmp_path, "full")  # type: ignore[arg-type]


REMOTE = """
import os
open(os.environ["EQAT_MARKER"], "a").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig
"""


def test_a_models_own_code_runs_only_with_the_flag(
    make: Make, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setenv("EQAT_MARKER", str(marker))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = local_model(tmp_path / "model")
    (model / "evil.py").write_text(REMOTE)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "evil"
    config["architectures"] = ["EvilForCausalLM"]
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    run = make(**{"model.source": str(model)})
    assert engine(run, module=True).code() == 3
    error = failure(run, 3)
    assert "code from its own repository" in error.message
    assert "--trust-remote-code" in error.hint
    assert not marker.exists()
    trusted = make(**{"model.source": str(model), "model.trust_remote_code": True, "e2e_qp.enabled": False})
    code = engine(trusted, module=True).code()
    assert code == 0, output(trusted)
    assert marker.exists(), output(trusted)
