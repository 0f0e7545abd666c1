"""Points as TensorBoard's event files, written by its own library, without TensorFlow or torch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.config.writing import to_toml
from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.system.copying import check_target
from engine.system.temporary import unique
from eqat_tui.outside import outside_runs, write_failed
from eqat_tui.tracking.points import Point

ANOTHER = "choose another folder with --to"
FOLDER = Path("tensorboard")
"""In it every run has a folder, unless another one was asked for: ``tensorboard --logdir tensorboard``."""
LARGEST = 3.4e38
"""What TensorBoard's numbers hold; it draws what is larger as infinite."""


def open_events(run: RunDirectory, to: Path | None) -> EventFile:
    """An event file in a new or empty folder: a second one beside it would be drawn over the first."""
    folder = (to or FOLDER / run.id).absolute()
    check_target(folder, run.path)
    outside_runs(folder, ANOTHER)
    return EventFile(folder, run)


class EventFile:
    """One file of events, in the format that TensorBoard's data loader reads while it grows."""

    def __init__(self, folder: Path, run: RunDirectory) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        now = time.time()
        self._path = folder / f"events.out.tfevents.{int(now)}.eqat.{unique(2)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "xb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise write_failed(error, self._path, ANOTHER) from error
        self._records = RecordWriter(self._file)
        self._put(Event(wall_time=now, file_version="brain.Event:2"))
        settings = _settings(run)
        if settings:
            self.write([Point(now, 0, texts={"settings": settings})])

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            values = [_scalar(name, value) for name, value in point.values.items()]
            values += [_text(name, text) for name, text in point.texts.items()]
            step = min(max(point.step, -(2**62)), 2**62)
            self._put(self._event(wall_time=point.t, step=step, summary=_summary(values)))
        self._sync()

    def close(self) -> None:
        self._file.close()

    def _put(self, event: Any) -> None:
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            raise self._failed(error) from error

    def _sync(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> EqatError:
        with suppress(OSError):  # closing tries to write what is left once more
            self._file.close()
        return write_failed(error, self._path, ANOTHER)


def _summary(values: list[Any]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=values)


def _scalar(name: str, value: float | None) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    number = math.nan if value is None else float(min(max(value, -LARGEST), LARGEST))
    return Summary.Value(tag=name, simple_value=number)


def _text(name: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    words = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text.encode()])
    kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=name, metadata=kind, tensor=words)


def _settings(run: RunDirectory) -> str:
    """The run's configuration as a block of TOML; nothing where it cannot be read, which stops nothing."""
    try:
        text = to_toml(run.config())
    except Exception:  # whatever a damaged file makes a parser raise
        return ""
    return "".join(f"    {line}\n" for line in text.splitlines())
