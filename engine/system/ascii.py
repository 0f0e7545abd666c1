"""Our own signs for terminals and files that have only ASCII: each becomes one that is as wide, but arrows
to the right and the left, which would be read as keys."""

from __future__ import annotations

SIGNS: dict[int, str] = str.maketrans(
    {
        **dict.fromkeys("─━╌┄┈═▔▁⎯╴╶╸╺", "-"),
        **dict.fromkeys("│┃╎┆┊║▌▐▏▕▎▍", "|"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛╔╗╚╝╠╣╦╩╬╇╈", "+"),
        **dict.fromkeys("█▉▊▋■●◉⬤▇▆▅▄▃▂", "#"),
        **dict.fromkeys("░▒▓·•∙○◌□", "."),
        **dict.fromkeys("►▶❯➜›", ">"),
        **dict.fromkeys("◂◀❮‹", "<"),
        **dict.fromkeys("▼↓", "v"),
        **dict.fromkeys("▴▲↑", "^"),
        **dict.fromkeys("✓✔", "+"),
        **dict.fromkeys("✗✘×", "x"),
        **dict.fromkeys("–—−", "-"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("▀", "="),
        "→": "->",
        "←": "<-",
        "▸": "+",  # what can be unfolded
        "▾": "-",  # what is unfolded
        "‖": "|",
        "…": "~",
        "°": " ",
        "≤": "<",
        "≥": ">",
        "≈": "~",
        "\xa0": " ",
    }
)
