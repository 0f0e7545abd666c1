"""Reading from the hub, from a stand-in on this machine: a model, a data set that is streamed, WikiText-2;
and each way in which a hub fails, which ends well or in a line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hub_standin import Hub, hub_at_work
from pyarrow import parquet
from safetensors.numpy import save_file

from engine.errors import ExitCode

REPOSITORY = Path(__file__).parents[2]
MODEL, TEXT = "somebody/tiny", "somebody/stories"
ARTICLES = [
    "",
    " = One = \n",
    "",
    " The first . \n",
    "",
    " = = Part = = \n",
    " = Two = \n",
    " The second . \n",
]
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
---
"""

Ask = Callable[..., dict[str, Any]]


def fill(folder: Path) -> None:
    """What the hub has: a tiny model, and texts."""
    import numpy

    model = folder / "models" / MODEL
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    save_file({"weight": numpy.arange(50_000, dtype=numpy.float32)}, model / "model.safetensors")
    (model / "model.gguf").write_bytes(b"the same again")
    text = folder / "datasets" / TEXT
    text.mkdir(parents=True)
    for split, count in (("train", 60), ("test", 3)):
        lines = (json.dumps({"text": f"{split} {number}"}) for number in range(count))
        (text / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    wiki = folder / "datasets" / "Salesforce" / "wikitext"
    (wiki / "wikitext-2-raw-v1").mkdir(parents=True)
    (wiki / "README.md").write_text(CARD)
    for split in ("train", "test"):
        table = pyarrow.table({"text": ARTICLES})
        parquet.write_table(table, wiki / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    fill(folder)
    with hub_at_work(folder) as hub:
        yield hub


@pytest.fixture(scope="module")
def reader(standin: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks a process that reads from the stand-in, with an empty cache at first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {
        **kept,
        "HF_ENDPOINT": standin.address,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hub_reader.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(**asked: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            said: dict[str, Any] = json.loads(process.stdout.readline())
            return said

        yield ask
        process.stdin.close()


@pytest.fixture
def hub(standin: Hub) -> Hub:
    standin.be_well()
    return standin


@pytest.fixture
def ask(reader: Ask, hub: Hub) -> Ask:
    return reader


GATED = {"X_Error_Code": "GatedRepo"}
REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    ("gated, 403", {"status": 403, **GATED}, "gated", "hf auth login"),
    ("gated, 401", {"status": 401, **GATED}, "gated", "hf auth login"),
    ("401", {"status": 401}, "wants to know who you are (401)", "hf auth login"),
    ("403", {"status": 403}, "no access (403)", "accept its terms"),
    ("429", {"status": 429, "Retry_After": "1"}, "asked too often (429)", "wait 1 s and run again"),
    ("429, for long", {"status": 429, "Retry_After": "900"}, "asked too often (429)", "wait 900 s"),
    ("503", {"status": 503}, "does not work at the moment (503)", "run again later"),
]


@pytest.mark.parametrize("fault", REFUSALS, ids=[name for name, *_ in REFUSALS])
def test_what_the_hub_refuses_is_said_in_a_line(
    fault: tuple[str, dict[str, Any], str, str], hub: Hub, ask: Ask
) -> None:
    _, answer, says, remedy = fault
    hub.fail(**answer)
    for asked, code in (
        ({"model": "somebody/new"}, ExitCode.PREFLIGHT),
        ({"text": TEXT, "part": "train"}, ExitCode.DATA),
    ):
        found = ask(**asked)
        assert says in found["error"] or "gated" in says, found
        assert ("gated" in found["error"]) == ("gated" in says), found
        assert remedy in found["error"] or "text" in asked, found
        assert (found["code"], "\n" in found["error"]) == (code, False)
        assert found["error"].startswith(f"{asked.get('model', TEXT)}: ")


def test_what_is_not_there_is_told_from_what_cannot_be_reached(hub: Hub, ask: Ask) -> None:
    assert "is neither a local folder or file nor a repository" in ask(model="somebody/nothing")["error"]
    assert "no such revision" in ask(model=MODEL, revision="v9")["error"]
    assert "doesn't exist on the Hub" in ask(text="somebody/nothing", part="train")["error"]
    assert "not complete in the local cache" in ask(model="somebody/nothing", offline=True)["error"]


def test_a_model_comes_whole_through_a_busy_hub_and_cut_connections(hub: Hub, ask: Ask) -> None:
    hub.fail(503, times=2)
    hub.cuts = 2
    found = ask(model=MODEL)
    weights = hub.folder / "models" / MODEL / "model.safetensors"
    assert found["read"]["model.safetensors"] == weights.stat().st_size
    assert sorted(found["read"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    # The same weights in another form were not fetched at all.
    assert [name for name in hub.asked if name.startswith("model")] == ["model.safetensors"] * 3
    hub.fail(503)
    assert ask(model=MODEL, offline=True) == found
    assert ask(model=MODEL) == found  # a hub that is down does not matter either


def test_a_hub_that_wants_to_be_asked_later_is(hub: Hub, ask: Ask) -> None:
    hub.fail(429, times=3, Retry_After="1")
    assert ask(text=TEXT, part="evaluation")["read"] == ["test 0", "test 1", "test 2"]
    assert hub.times == 0
    hub.fail(503, times=2, of=".jsonl")
    assert len(ask(text=TEXT, part="train", documents=5)["read"]) == 5
    assert hub.times == 0


def test_wikitext_comes_as_published(hub: Hub, ask: Ask) -> None:
    said = ask(text="wikitext2", part="evaluation")
    assert "read" in said, said
    found = said["read"]
    assert "\n\n".join(found) == "\n\n".join(ARTICLES)
    assert len(found) == 2
