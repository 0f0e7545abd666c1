"""What a run leaves on the disk, and what it does not do with what lies there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import WEIGHTS, Child, failure, local_model, make_run, of, output, run_here, start
from safetensors.torch import load_file, save_file

from engine.models.source import ModelSource
from engine.run import events
from engine.run.config import ModelConfig
from engine.run.directory import RunDirectory, run_state
from engine.streams import StoredStreams

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

OFTEN = {
    "block_ap.epochs": 4,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
    "runtime.streams": "stored",
}
KNOWN = {".json", ".jsonl", ".toml", ".safetensors", ".log", ".raw", ".md", ".txt", ".done", ".jinja", ""}


def files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_checkpoints_and_caches_hold_no_pickles(make: Make, engine: Engine) -> None:
    run = make(**OFTEN)
    child = engine(run)
    child.until(lambda: any(e.step for e in of(run, events.CheckpointCommitted)))
    child.send(signal.SIGKILL)
    child.code()
    cache = Path(os.environ["EQAT_CACHE_DIR"])
    killed = files(run.path, cache)
    assert {".safetensors", ".raw"} <= {path.suffix for path in killed} | {".raw"}
    assert run_here(run) == 0
    for path in {*killed, *files(run.path, cache)}:
        if not path.exists():
            continue
        assert path.suffix in KNOWN or path.name.endswith(".tmp"), path
        head = path.read_bytes()[:4] if path.suffix != ".raw" else b""
        assert not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), path


def test_nothing_in_a_run_directory_is_executed(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make()
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'a').write(__file__)\n"
    for folder in (run.path, run.cache_dir, run.checkpoints_dir, run.control_dir):
        for name in ("engine", "torch", "json", "sitecustomize", "usercustomize", "conftest", "tokenizer"):
            (folder / f"{name}.py").write_text(code)
        (folder / "evil.pth").write_text(f"import os; {code}")
    (run.path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": "tokenizer.T"}})
    )
    monkeypatch.chdir(run.path)
    assert start(run, module=True).code() == 0, output(run)
    assert run_state(run) == "done"
    assert not marker.exists()


@pytest.mark.parametrize(("umask", "forbidden"), [(0, stat.S_IWGRP | stat.S_IWOTH), (0o077, 0o077)])
def test_files_are_created_with_sane_permissions(tmp_path: Path, umask: int, forbidden: int) -> None:
    before = os.umask(umask)
    try:
        run = make_run(tmp_path / "runs", OFTEN)
        assert run_here(run) == 0
    finally:
        os.umask(before)
    for path in [run.path, *run.path.rglob("*")]:
        mode = path.stat().st_mode
        assert not mode & forbidden, f"{path} {oct(mode)}"
        if path.is_file():
            assert not mode & 0o111, f"{path} is executable"


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


def test_a_models_identity_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    one, two = local_model(tmp_path / "one"), local_model(tmp_path / "two")
    os.utime(two / WEIGHTS, (1, 1))
    identities = [
        ModelSource.open(ModelConfig(source=str(place))).identity()["sha256"] for place in (one, two)
    ]
    assert identities[0] == identities[1]


def test_a_large_models_identity_is_quick_and_sees_every_part(tmp_path: Path) -> None:
    from engine.models.source import _samples

    file = tmp_path / "shard"
    with file.open("wb") as shard:
        shard.truncate(5 << 30)
    began = time.monotonic()
    before = hashlib.sha256(b"".join(_samples(file))).hexdigest()
    assert time.monotonic() - began < 1
    for offset in (0, (5 << 30) - 1):
        with file.open("r+b") as shard:
            shard.seek(offset)
            shard.write(b"x")
        after = hashlib.sha256(b"".join(_samples(file))).hexdigest()
        assert after != before
        before = after


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
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert start(run, module=True).code() == 3
    error = failure(run, 3)
    assert "code from its own repository" in error.message
    assert "--trust-remote-code" in error.hint
    assert not marker.exists()
    trusted = make(**{"model.source": str(model), "model.trust_remote_code": True, "e2e_qp.enabled": False})
    start(trusted, module=True).code()
    assert marker.exists(), output(trusted)
