"""HTML and SVG as nested calls, in which every text is foreign until it is markup made here.

    tag("p", "perplexity of ", tag("b", name))

What a run's log, its configuration or its model say is a ``str``, and becomes text: never an element, an
attribute or a control character, whatever is in it. Only :class:`Html`, which :func:`tag` returns, goes in as
it is.
"""

from __future__ import annotations

import html

from engine.system.printable import printable_lines

MOST_LETTERS = 20_000
"""Of one text; nobody reads on in a log that holds megabytes of one."""


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


Child = str | None
"""A text, markup, or nothing."""


def text(value: str) -> Html:
    """``value`` as text of a page, which shows only itself."""
    if isinstance(value, Html):
        return value
    shown = printable_lines(value[:MOST_LETTERS])
    return Html(html.escape(f"{shown} …" if len(value) > MOST_LETTERS else shown))


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """An element. ``class_`` is its class, an underscore in any other attribute a hyphen; an attribute that
    is ``None`` is left out."""
    given = "".join(
        f' {"class" if key == "class_" else key.replace("_", "-")}="{text(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: str | float | None) -> Html:
    """An element that HTML knows without an end."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


def join(*children: Child) -> Html:
    """Several pieces, one behind the other."""
    return Html("".join(text(child) for child in children if child is not None))


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def table(rows: list[list[Child]], *, head: list[Child] | None = None, first_is_name: bool = True) -> Html:
    """A table that a narrow screen can scroll; the first cell of a row names it."""
    lines = [tag("thead", tag("tr", *(tag("th", one, scope="col") for one in head)))] if head else []
    body = []
    for row in rows:
        name = [tag("th", row[0], scope="row")] if first_is_name and row else []
        body.append(tag("tr", *name, *(tag("td", one) for one in row[len(name) :])))
    return tag("div", tag("table", *lines, tag("tbody", *body)), class_="wide")
