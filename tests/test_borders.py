"""Words reach a terminal in few places, all of which clean them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

ALLOWED = {
    # They make what they print printable.
    ("eqat_tui/output.py", "print"),
    # LiveDisplay._print, whose words went through progress.lasting.
    ("eqat_tui/display.py", "_console.print"),
}
"""Where something is written to a stream that may be a terminal's, reviewed by hand."""

WRITERS = {"print", "echo", "secho", "pprint", "prompt", "confirm"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}


def calls(tree: ast.AST) -> Iterator[str]:
    """Names of the calls in a module that write to a terminal."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        words: list[str] = []
        target: ast.expr = node.func
        while isinstance(target, ast.Attribute):
            words.insert(0, target.attr)
            target = target.value
        if isinstance(target, ast.Name):
            words.insert(0, target.id)
        name = words[-1] if words else ""
        to_stream = name in ("write", "writelines") and bool(STREAMS & set(words[:-1]))
        if name in WRITERS or to_stream or (words[:1] == ["os"] and name == "write"):
            yield ".".join(words[-2:])


def found(folder: str) -> set[tuple[str, str]]:
    return {
        (str(path.relative_to(REPOSITORY)), call.removeprefix("self."))
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for call in calls(ast.parse(path.read_text()))
    }


def test_only_one_module_of_the_command_line_writes_to_the_terminal() -> None:
    assert found("eqat_tui") == ALLOWED


def test_the_search_for_writers_finds_them() -> None:
    tree = ast.parse(
        "import sys\nprint(1)\nsys.stdout.write('x')\nself.console.print(2)\ntyper.echo(3)\nfile.write(4)"
    )
    assert list(calls(tree)) == ["print", "stdout.write", "console.print", "typer.echo"]


def test_no_widget_takes_a_title_or_a_note_as_markup() -> None:
    """A run may be called ``[/]``: titles go through ``entitle`` and notes through ``EqatApp.notify``."""
    places = [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "eqat_tui").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("border_title", "border_subtitle"))
        or (isinstance(node, ast.Attribute) and node.attr in ("from_markup", "tooltip"))
    ]
    assert places == ["eqat_tui/widgets/panel.py"]
