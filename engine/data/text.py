"""Where text comes from: the built-in corpus, local files or hub data sets, behind one interface
(:class:`~engine.data.parts.TextSource`).

Hub sources stream: nothing is downloaded beyond what is read. Local and built-in sources never touch
the network. This module imports neither torch nor datasets: they load when needed.
"""

from __future__ import annotations

import os

from engine.config.corpora import CORPORA, hub_name, is_hub_id, is_path, local_name, local_path, no_text
from engine.config.data import BUILTIN, DataConfig
from engine.data.builtin import BuiltinText
from engine.data.hub import HINT, HubText, hub_source
from engine.data.local import LocalText
from engine.data.parts import TextSource
from engine.errors import DataError


def open_source(data: DataConfig) -> TextSource:
    """The source that ``data.source`` names: ``builtin``, a shortcut, a path, or a hub id."""
    name = data.source.strip()
    if name == BUILTIN:
        return BuiltinText()
    if name in CORPORA:
        return HubText(hub_source(data), corpus=name)
    path = local_path(name)
    if name and os.path.exists(path):
        return LocalText(path, column=data.column, split=data.split, corpus=local_name(path))
    if is_path(name):
        raise DataError("no such file or folder", where=name, hint="check data.source")
    if is_hub_id(name):
        # Who meant a folder must hear that there is none: the hub's own answer speaks of the hub alone.
        hint = f"no file or folder {name} lies here either; {HINT}"
        return HubText(hub_source(data), corpus=hub_name(name), hint=hint)
    raise no_text(name, "data.source")
