"""The user's own defaults: what they say, what goes before them, and how a mistake in them is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.user import UserConfig, load_user_config, user_config_path
from engine.errors import UsageError
from engine.run.finding import default_runs_dir
from eqat_tui.configure import build_config


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQAT_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("EQAT_RUNS_DIR", raising=False)
    return tmp_path / "config.toml"


def test_without_a_file_there_are_no_defaults(written: Path) -> None:
    assert user_config_path() == written
    assert load_user_config() == UserConfig()
    assert default_runs_dir() == Path("runs")


def test_the_folder_for_configuration_files_is_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("EQAT_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_config_path() == tmp_path / "eqat" / "config.toml"


def test_flag_variable_and_file_go_before_a_default(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written.write_text('runs_dir = "/data/runs"\ndevice = "cuda:1"\n')
    assert default_runs_dir() == Path("/data/runs")
    monkeypatch.setenv("EQAT_RUNS_DIR", "/other")
    assert default_runs_dir() == Path("/other")
    assert default_runs_dir("/typed") == Path("/typed")
    assert build_config("smoke").runtime.device == "cuda:1"
    assert build_config("smoke", device="auto").runtime.device == "auto"
    assert build_config("smoke", settings=["runtime.device=cpu"]).runtime.device == "cpu"
    mine = written.with_name("mine.toml")
    mine.write_text('extends = "smoke"\n[runtime]\ndevice = "cpu"\n')
    assert build_config(str(mine)).runtime.device == "cpu"


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("run_dir = 1", "run_dir", "did you mean runs_dir?"),
        ("device = 3", "device", "text"),
        ('device = "tpu"', "device", "cuda:N"),
        ('[notify]\non = ["sometimes"]', "notify.on", "done, failed, stopped, waiting"),
        ('[notify]\nwebhook = "localhost"', "notify.webhook", "https://"),
        ('[notify]\ncommand = [""]', "notify.command", "notify-send"),
        ("[notify]\nbel = true", "notify.bel", "did you mean notify.bell?"),
        ("notify = 3", "notify", "a table"),
    ],
)
def test_a_mistake_is_told_with_file_and_field(written: Path, text: str, field: str, words: str) -> None:
    written.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_user_config()
    assert caught.value.where == f"{written}: {field}"
    assert words in caught.value.hint


@pytest.mark.parametrize("content", [b"runs_dir = ", b"\xff\xfe", b"a" * 100])
def test_what_is_no_toml_is_told_with_its_file(written: Path, content: bytes) -> None:
    written.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_user_config()
    assert caught.value.where.startswith(str(written))
