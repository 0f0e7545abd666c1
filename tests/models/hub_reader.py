"""A process that reads from a hub what it is told on its standard input, one JSON line at a time, and says
what came of it. The libraries are imported once for all of it, and wait for nothing."""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.01))  # a hub that is asked again at once

from engine.config.data import DataConfig  # noqa: E402
from engine.data.hub import HubText, hub_source  # noqa: E402
from engine.errors import EqatError  # noqa: E402
from engine.models.hub import download  # noqa: E402
from engine.offline import offline  # noqa: E402


def read(asked: dict[str, Any]) -> Any:
    """What was read."""
    with offline(asked.get("offline", False)):
        if "model" in asked:
            folder = download(asked["model"], asked.get("revision"))
            return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        source = hub_source(DataConfig(source=asked["text"]))
        text = HubText(source, asked["text"])
        return list(itertools.islice(text.documents(asked["part"], 0), asked.get("documents", 1 << 30)))


for line in sys.stdin:
    try:
        said: dict[str, Any] = {"read": read(json.loads(line))}
    except EqatError as error:
        said = {"error": str(error), "code": int(error.exit_code)}
    print(json.dumps(said), flush=True)
