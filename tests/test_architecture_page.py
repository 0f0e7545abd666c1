"""The page that newcomers read names what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_path_on_the_page_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    named = re.findall(r"`((?:engine|eqat_tui|tests|docs|presets)/[\w./]*)`", prose)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_room_of_the_diagram_exists_and_none_is_missing() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    diagram = text.split("```")[3]
    rooms = {path.name for path in (ROOT / "engine").iterdir() if (path / "__init__.py").exists()}
    assert [room for room in sorted(rooms) if f" {room}/" not in diagram] == []
