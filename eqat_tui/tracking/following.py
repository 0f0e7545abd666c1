"""Reading a run's log from outside, once or as it grows, and handing on what it says."""

from __future__ import annotations

import errno
import time

from engine.errors import run_is_gone
from engine.run.directory import RunDirectory
from engine.run.event_log import event_pieces
from engine.run.liveness import look
from engine.system.guarded import bad_file
from eqat_tui.tracking.points import Points
from eqat_tui.tracking.table import Sink

POLL_S = 0.5
HICCUPS = (errno.ESTALE, errno.EIO)
"""Of network file systems; the next look works."""


def hand_on(run: RunDirectory, sink: Sink, *, follow: bool) -> int:
    """Hand on all that the log of ``run`` says; with ``follow`` until no engine works on it any more. Returns
    how many points that were.

    Raises:
        EqatError: where the log cannot be read, the run is gone, or the sink cannot be written.
    """
    points, count, offset = Points(), 0, 0
    while True:
        # Looked at first: what an engine has said until its end is in the log when it is gone.
        at_work = follow and look(run).work is not None
        try:
            for events, behind in event_pieces(run.events_path, offset):
                found = [point for event in events if (point := points.of(event)) is not None]
                sink.write(found)
                count, offset = count + len(found), behind
        except FileNotFoundError as error:
            if not run.config_toml.exists():
                raise run_is_gone(run.path) from error
        except OSError as error:
            if not (at_work and error.errno in HICCUPS):
                raise bad_file(error, run.events_path) from error
        if not at_work:
            return count
        time.sleep(POLL_S)
