"""A run reads one model and one text from its beginning to its end, or ends with 8 and can be resumed.

Files are replaced while a real run works, at a moment that its own events tell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_runs import WEIGHTS, change, exported, failure, local_model, make_run, of, run_here
from safetensors.torch import load_file, save_file

from engine.data import tokens as token_module
from engine.errors import IdentityError
from engine.reporter import Reporter
from engine.run import events
from engine.run.directory import RunDirectory

Begins = Callable[[events.Event], bool]


def block_1(event: events.Event) -> bool:
    return isinstance(event, events.BlockStarted) and event.block == 1


def the_export(event: events.Event) -> bool:
    return isinstance(event, events.PhaseStarted) and event.phase == "export"


def doing(monkeypatch: pytest.MonkeyPatch, when: Begins, action: Callable[[], object]) -> list[events.Event]:
    """Has ``action`` done once, when the engine tells the event."""
    seen: list[events.Event] = []
    real = Reporter.emit

    def emit(self: Reporter, event: events.Event) -> None:
        real(self, event)
        if not seen and when(event):
            seen.append(event)
            action()

    monkeypatch.setattr(Reporter, "emit", emit)
    return seen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = local_model(tmp_path_factory.mktemp("stays") / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The export of a run that nobody disturbs."""
    os.environ["EQAT_CACHE_DIR"] = str(tmp_path_factory.getbasetemp() / "eqat-cache")
    run = make_run(tmp_path_factory.mktemp("undisturbed"), {"model.source": str(model)})
    assert run_here(run) == 0
    return exported(run)


def other_weights(file: Path) -> None:
    """Weights of the same size and names, in place of the file by a rename as programs do it."""
    tensors = {name: tensor * 1.25 for name, tensor in load_file(file).items()}
    save_file(tensors, file.with_name(".new"))
    os.replace(file.with_name(".new"), file)


def in_place(file: Path) -> None:
    """The last bytes are other ones; the inode and the size stay."""
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\x01" * 8)


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("name", "when", "spoil"),
    [
        (WEIGHTS, block_1, other_weights),
        (WEIGHTS, block_1, in_place),
        (WEIGHTS, block_1, Path.unlink),
        (WEIGHTS, the_export, other_weights),
        ("tokenizer.json", the_export, longer),
        ("chat_template.jinja", the_export, Path.unlink),
        ("generation_config.json", the_export, longer),
        ("config.json", the_export, longer),
    ],
)
def test_a_model_that_changes_while_a_run_works_ends_it_with_8_and_it_goes_on_once_it_is_back(
    name: str,
    when: Begins,
    spoil: Callable[[Path], None],
    model: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, saved = model / name, tmp_path / "saved"
    shutil.copyfile(file, saved)
    run = make_run(tmp_path / "runs", {"model.source": str(model)})
    try:
        with monkeypatch.context() as patch:
            assert doing(patch, when, lambda: spoil(file)) is not None
            assert run_here(run) == 8
        error = failure(run, 8)
        assert error.where == str(file)
        assert "resume" in error.hint
        assert not of(run, events.Export)
    finally:
        shutil.copyfile(saved, file)
    assert run_here(run) == 0, "a copy with another inode and another time is the same model"
    assert exported(run) == expected


def test_another_tokenizer_between_two_attempts_is_another_model(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    run = make_run(tmp_path / "runs", {"model.source": str(folder), "e2e_qp.enabled": False})
    assert run_here(run) == 0
    longer(folder / "generation_config.json")
    assert run_here(run) == 8
    assert failure(run, 8).where == "tokenizer"


# -- text ----------------------------------------------------------------------------------------------

TEXT = "\n".join(f"{n} times {m} is {n * m}." for n in range(60) for m in range(60))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_text_that_changes_while_it_is_read_ends_with_8_and_leaves_no_tokens(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / f"text{suffix}"
    lines = TEXT if suffix == ".txt" else "\n".join(f'{{"text": "{line}"}}' for line in TEXT.splitlines())
    path.write_text(lines)
    run = make_run(tmp_path / "runs", {"data.source": str(path), "block_ap.enabled": False})
    real = token_module._drawn_windows

    def replaced(*arguments: Any) -> Any:
        path.write_text(lines.replace("times", "TIMES"))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(token_module, "_drawn_windows", replaced)
        assert run_here(run) == 8
    assert failure(run, 8).where == str(path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    path.write_text(lines)
    assert run_here(run) == 0


def test_a_text_that_changes_behind_what_was_read_of_it_is_not_cached_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    run: RunDirectory = make_run(tmp_path / "runs", {"data.source": str(path)})
    real = token_module._drawn_windows

    def then_replaced(*arguments: Any) -> Any:
        windows = real(*arguments)
        path.write_text(TEXT.upper())
        return windows

    with monkeypatch.context() as patch:
        patch.setattr(token_module, "_drawn_windows", then_replaced)
        assert run_here(run) == 8
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_a_text_is_called_is_known_without_the_text(tmp_path: Path) -> None:
    """A report names it hours after it was read, when it may be gone."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    run = make_run(tmp_path / "runs", {"data.source": str(path), "evaluation.data.source": str(path)})
    with pytest.MonkeyPatch.context() as patch:
        doing(patch, block_1, path.unlink)
        assert run_here(run) == 0
    change(run)
    assert {event.corpus for event in of(run, events.Eval)} == {str(path)}


def test_a_stamped_file_is_compared_before_and_after_every_reading(tmp_path: Path) -> None:
    from engine.system.stamps import StampedFile

    path = tmp_path / "file"
    path.write_bytes(b"12345")
    file = StampedFile.of(path)
    assert file.read() == b"12345"
    with pytest.raises(IdentityError), file.opened():
        path.write_bytes(b"1234")
    path.write_bytes(b"12345")
    with pytest.raises(IdentityError):
        file.read()
    path.unlink()
    with pytest.raises(IdentityError, match="is gone"):
        file.read()
    os.mkfifo(path)
    with pytest.raises(IdentityError):
        file.read()
