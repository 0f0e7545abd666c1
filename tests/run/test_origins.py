"""What is wrong in a .toml file is said with the file and the line, whoever finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.loading import load
from engine.config.origins import line_of
from engine.errors import UsageError
from eqat_tui.configure import build_config


def written(place: Path, text: str) -> Path:
    place.write_text(text)
    return place


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('extends = "smoke"\n\n[grid]\nbits = "x"\n', 4, "grid.bits: Expected int"),
        ('extends = "smoke"\n[grid]\nbits = 77\n', 3, "grid.bits: cannot be 77"),
        ('extends = "smoke"\ngrid = {bits = 77}\n', 2, "grid.bits: cannot be 77"),
        ('extends = "smoke"\ngrid.bits = 77\n', 2, "grid.bits: cannot be 77"),
        ('extends = "smoke"\n[grid]\n# bits\nbitz = 3\n', 4, "grid.bitz: there is no such field"),
        ('extends = "smoke"\n[gird]\nbits = 3\n', 2, "gird: there is no such field"),
        ('extends = "smoke"\nbits = 3\n', 2, "bits: there is no such field"),
        ('extends = "smoke"\n[block_ap]\nepochs = -1\n', 3, "block_ap.epochs: "),
        ('extends = "smoke"\n[grid\n', 2, "is not valid TOML"),
    ],
)
def test_a_mistake_names_the_file_and_the_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = written(tmp_path / "mine.toml", text)
    with pytest.raises(UsageError) as caught:
        build_config(str(path))
    said = str(caught.value)
    assert str(path) in said
    assert f"line {line}" in said
    assert words in said


def test_a_mistake_in_a_file_that_is_extended_names_that_file(tmp_path: Path) -> None:
    base = written(tmp_path / "base.toml", 'extends = "smoke"\n[grid]\nbits = 5\n')
    mine = written(tmp_path / "mine.toml", 'extends = "base.toml"\n[block_ap]\nepochs = 1\n')
    with pytest.raises(UsageError, match=r"line 3: grid\.bits") as caught:
        build_config(str(mine))
    assert str(base) in str(caught.value)


def test_what_was_typed_is_not_the_files(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.toml", 'extends = "smoke"\n[grid]\nbits = 3\n')
    for more in ({"bits": 5}, {"settings": ["grid.bits=5"]}):
        with pytest.raises(UsageError) as caught:
            build_config(str(mine), **more)  # type: ignore[arg-type]
        assert caught.value.where == "grid.bits"
    with pytest.raises(UsageError) as caught:
        build_config("smoke", bits=5)
    assert caught.value.where == "grid.bits"


def test_a_run_whose_configuration_cannot_be_read_names_its_file(tmp_path: Path) -> None:
    written(tmp_path / "config.toml", 'extends = "smoke"\n[grid]\nbits = [3]\n')
    with pytest.raises(UsageError, match=r"config\.toml, line 3: grid\.bits"):
        load(str(tmp_path))


def test_lines_of_anything_are_a_number_or_none(tmp_path: Path) -> None:
    for text in ("", "[", "= = =\n", '"grid"."bits" = 3', "grid . bits = 3", "[[grid]]\nbits = 3", "\x00"):
        line = line_of(written(tmp_path / "odd.toml", text), "grid.bits")
        assert line is None or line >= 1
    assert line_of(tmp_path / "none.toml", "grid.bits") is None
