"""The real engine behind the command line: the smoke preset, every phase, down to a verified export."""

from __future__ import annotations

import json
from pathlib import Path

from cli_tools import Eqat

from eqat_tui.doctor import smoke

SMALL = {"block_ap.sequences": 4, "block_ap.epochs": 1, "e2e_qp.sequences": 4, "evaluation.windows": 4}


def test_a_run_is_started_detached_attached_to_and_shown(eqat: Eqat, tmp_path: Path) -> None:
    fewer = [f"{name}={count}" for name, count in SMALL.items()]
    settings = [word for setting in fewer for word in ("--set", setting)]
    started = eqat("run", "smoke", "--device", "cpu", *settings, "--detach", "--json")
    run_id = json.loads(started.stdout)["id"]
    followed = eqat("attach", run_id[-4:], "--json", timeout=250)
    assert followed.returncode == 0, followed.stderr
    result = json.loads(followed.stdout)
    assert (result["id"], result["state"]) == (run_id, "done")
    assert all(result["perplexity"][stage] > 0 for stage in ("fp", "rtn", "block_ap", "e2e_qp"))
    assert result["size_bytes"]["quantized"] < result["size_bytes"]["fp"]
    (export,) = result["exports"]
    assert (export["format"], export["verified"]) == ("gptq_v2", True)
    files = tmp_path / "runs" / run_id / "export" / "gptq_v2"
    assert {"config.json", "README.md"} <= {file.name for file in files.iterdir()}
    assert "verified" in eqat("show", "latest").stdout
    (row,) = json.loads(eqat("runs", "--json").stdout)
    assert (row["id"], row["state"], row["exports"]) == (run_id, "done", ["gptq_v2"])
    # Several more, with commas and again, each once.
    wanted = ("--format", "compressed-tensors,hf", "--format", "hf, mlx", "--set", "export.dtype=float32")
    again = eqat("export", "latest", *wanted, timeout=250)
    assert again.returncode == 0, again.stderr
    shown = json.loads(eqat("show", "latest", "--json").stdout)
    formats = ["gptq_v2", "compressed-tensors", "hf", "mlx"]
    assert [(each["format"], each["verified"]) for each in shown["exports"]] == [(f, True) for f in formats]
    sizes = {each["format"]: each["bytes"] for each in shown["exports"]}
    assert shown["size_bytes"]["quantized"] == min(sizes.values()) < sizes["hf"]
    config = json.loads((files.parent / "compressed-tensors" / "config.json").read_text())
    assert config["dtype"] == "float32"
    deciding = eqat("export", "latest", "--set", "grid.bits=2")
    assert (deciding.returncode, "grid.bits: decides what is computed" in deciding.stderr) == (2, True)
    refused = eqat("export", "latest", "--format", "mlx,zip")
    assert (refused.returncode, "no format 'zip'" in refused.stderr) == (2, True)


def test_doctor_proves_itself_by_a_run_of_every_phase() -> None:
    check = smoke()
    assert check.status == "ok", check
    assert "gptq_v2" in check.detail
