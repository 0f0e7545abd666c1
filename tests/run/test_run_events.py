from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_strategies import log_of, some_event

from engine.errors import PreflightError
from engine.run import event_log, events
from engine.run.event_log import EventFollower, EventWriter, read_events
from engine.run.measures import Divergence, TextMeasure

REPOSITORY = Path(__file__).parents[2]


class Clock:
    """A monotonic clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def metric(step: int, **fields: object) -> events.Metric:
    payload = {"phase": "block_ap", "block": 0, "step": step, "steps": 99, "epoch": 0, "loss": 1.0, **fields}
    return events.Metric(**payload)  # type: ignore[arg-type]


BEGINS = events.AttemptStarting(pid=1, host="h", attempt=2)


def warning(message: str) -> events.Warning:
    return events.Warning(code="test", message=message)


def messages(path: Path) -> list[str]:
    return [event.message for event in read_events(path)[0] if isinstance(event, events.Warning)]


# -- the reader ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(some=st.lists(some_event(), min_size=1, max_size=4))
def test_reader_accepts_every_byte_prefix_of_a_log(
    tmp_path_factory: pytest.TempPathFactory, some: list[events.Event]
) -> None:
    path = tmp_path_factory.mktemp("prefix") / "events.jsonl"
    log = log_of(some)
    path.write_bytes(b"")
    with open(path, "ab", buffering=0) as file:
        read: list[events.Event] = []
        offset = 0
        for index in range(len(log)):
            file.write(log[index : index + 1])
            complete = log[: index + 1].count(b"\n")
            assert read_events(path)[0] == some[:complete]
            new, offset = read_events(path, offset)  # and the same to whoever follows byte by byte
            read += new
            assert read == some[:complete]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(some_event(), st.binary(max_size=30)), max_size=8))
def test_reader_finds_the_good_lines_among_any_others(lines: list[events.Event | bytes]) -> None:
    data = b""
    for line in lines:
        data += line.replace(b"\n", b" ") if isinstance(line, bytes) else event_log.encode(line)
        data += b"\n"
    assert event_log.parse_lines(data) == [line for line in lines if not isinstance(line, bytes)]


def test_reader_ignores_unknown_kinds_and_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    known = json.loads(event_log.encode(warning("known")))
    lines = [
        {**known, "added_by_a_newer_version": [1, 2]},
        {**known, "kind": "from.the.future"},
        {"kind": "warning"},  # without its payload
        {**known, "seq": "seven"},
        [],
    ]
    deep = b"[" * 100_000
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + deep + b"\n")
    assert messages(path) == ["known"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (events.Metric, {"phase": "lr_qat"}),
        (events.PhaseStarted, {"phase": "evaluate_lr_qat"}),
        (events.BlockFinished, {"phase": "lr_qat"}),
        (events.CheckpointCommitted, {"phase": "lr_qat"}),
        (events.Eval, {"stage": "lr_qat"}),
        (events.Sample, {"stage": "lr_qat"}),
    ],
)
def test_reader_keeps_phases_and_stages_that_it_does_not_know_as_text(
    kind: type[events.Event], changes: dict[str, str]
) -> None:
    values: dict[str, Any] = {field.name: 1 for field in msgspec.structs.fields(kind) if field.required}
    texts = {"corpus": "text", "prompt": "text"}
    made = kind(**{**values, **{name: texts[name] for name in texts if name in values}, **changes})
    assert event_log.parse_lines(event_log.encode(made) + b"\n") == [made]


@settings(max_examples=300, deadline=None)
@given(some_event(any_float=True))
def test_every_line_is_strict_json_and_decodes_to_its_kind(event: events.Event) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    line = event_log.encode(event)
    json.loads(line, parse_constant=refuse)
    assert b"\n" not in line
    (read,) = event_log.parse_lines(line + b"\n")
    assert type(read) is type(event)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_measure_that_is_no_number_is_lacking_and_its_event_is_read(number: float) -> None:
    sound = Divergence(kl=0.5, top1=0.75, logit_error=1.0, largest_logit_error=2.0)
    broken = msgspec.structs.replace(sound, largest_logit_error=number)
    texts = tuple(
        TextMeasure(corpus=name, perplexity=3.0, tokens=9, divergence=found)
        for name, found in (("one", sound), ("other", broken))
    )
    made = events.Eval(
        stage="fp",
        perplexity=2.0,
        tokens=9,
        sequence_length=3,
        seconds=0.1,
        corpus="text",
        texts=texts,
        divergence=broken,
    )
    (read,) = event_log.parse_lines(event_log.encode(made) + b"\n")
    assert isinstance(read, events.Eval)
    assert read.divergence is None
    assert read.texts == (texts[0], msgspec.structs.replace(texts[1], divergence=None))
    assert read.perplexity == 2.0
    whole = msgspec.structs.replace(made, divergence=sound, texts=texts[:1])
    assert event_log.parse_lines(event_log.encode(whole) + b"\n") == [whole]


def test_skipped_kinds_are_left_out_and_only_those() -> None:
    log = log_of([metric(1), warning("a"), metric(2)])
    (kept,) = event_log.parse_lines(log, frozenset({"metric"}))
    assert isinstance(kept, events.Warning)


def test_of_what_is_passed_over_the_last_of_each_attempt_can_be_kept() -> None:
    log = log_of([metric(1), warning("a"), metric(2), metric(3), BEGINS, metric(4), metric(5)])
    kept = event_log.parse_lines(log, frozenset({"metric"}), last=True)
    assert [getattr(event, "step", type(event)) for event in kept] == [
        events.Warning,
        3,
        events.AttemptStarting,
        5,
    ]
    torn = log.removesuffix(b"\n")[:-9]
    assert event_log.parse_lines(torn, frozenset({"metric"}), last=True) == kept[:-1]


def test_follower_waits_for_a_log_and_then_for_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = EventFollower(path)
    assert follower.poll() == []
    line = event_log.encode(warning("one"))
    path.write_bytes(line[:10])
    assert follower.poll() == []
    path.write_bytes(line + b"\n")
    assert len(follower.poll()) == 1
    assert follower.poll() == []


# -- the writer ----------------------------------------------------------------------------------------


def test_sequence_continues_over_attempts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for attempt in (1, 2):
        with EventWriter(path, attempt) as writer:
            writer.emit(warning("a"))
            writer.emit(warning("b"))
    read, _ = read_events(path)
    assert [(event.seq, event.attempt) for event in read] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert all(event.t > 1e9 and event.mono > 0 and event.v == events.VERSION for event in read)


def test_sequence_is_found_behind_a_line_longer_than_the_window(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, 1) as writer:
        writer.emit(warning("a"))
        writer.emit(warning("x" * 300_000))
    with open(path, "ab") as file:
        file.write(b"y" * 200_000)  # torn
    with EventWriter(path, 2) as writer:
        writer.emit(warning("b"))
    assert [event.seq for event in read_events(path)[0]] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_is_completed_on_resume(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, 1) as writer:
        writer.emit(warning("whole"))
        writer.emit(warning("torn"))
    path.write_bytes(path.read_bytes()[:-cut])
    with EventWriter(path, 2) as writer:
        writer.emit(warning("next"))
    # Cut by its newline only, the line is whole again; cut by more, it is lost and no other is.
    assert messages(path) == (["whole", "torn", "next"] if cut == 1 else ["whole", "next"])
    assert path.read_bytes().count(b"\n") == 3


def test_writing_to_a_full_device_is_counted_and_never_raised(tmp_path: Path) -> None:
    with EventWriter(tmp_path / "events.jsonl", 1) as writer, open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer._fd)
        for _ in range(3):
            writer.emit(warning("lost"))
        assert writer.dropped == 3
    writer.emit(warning("after close"))
    assert writer.dropped == 4


def test_writer_survives_a_disk_that_fills_and_empties(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = """
import resource, sys
from engine.run.event_log import EventWriter
from engine.run.events import Warning
writer = EventWriter(sys.argv[1], 1)
writer.emit(Warning(code="test", message="before"))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
for _ in range(20):
    writer.emit(Warning(code="test", message="during"))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
writer.emit(Warning(code="test", message="after"))
writer.close()
print(writer.dropped)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    dropped, read = int(done.stdout), read_events(path)[0]
    assert 0 < dropped < 20
    assert messages(path)[0] == "before"
    assert messages(path)[-1] == "after"
    assert len(read) == 22 - dropped
    assert read[-1].seq == 22  # the gap shows that lines were lost


def test_log_that_cannot_be_opened_is_a_preflight_error(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"events\.jsonl"):
        EventWriter(tmp_path / "missing" / "events.jsonl", 1)


def test_what_json_cannot_carry_does_not_cost_the_line(tmp_path: Path) -> None:
    class Number:
        def item(self) -> float:
            return 2.5

    path = tmp_path / "events.jsonl"
    with EventWriter(path, 1) as writer:
        writer.emit(metric(1, loss=math.nan, grad_norm=math.inf, lr={"scales": math.nan, "weights": 1.0}))
        writer.emit(metric(1, block=1, loss=Number()))
        writer.emit(warning("file \udcff name"))
        writer.emit(events.Plan(plan={"nan": math.nan, "path": Path("/x"), "deep": [{"inf": -math.inf}]}))
        assert writer.dropped == 0
    first, second, third, fourth = read_events(path)[0]
    assert isinstance(first, events.Metric)
    assert (first.loss, first.grad_norm, first.lr, first.non_finite) == (None, None, {"weights": 1.0}, True)
    assert isinstance(second, events.Metric)
    assert (second.loss, second.non_finite) == (2.5, False)
    assert isinstance(third, events.Warning)
    assert third.message == "file \\udcff name"
    assert isinstance(fourth, events.Plan)
    assert fourth.plan == {"nan": None, "path": "/x", "deep": [{"inf": None}]}


def test_threads_share_a_writer_without_mixing_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, 1) as writer:

        def emit() -> None:
            for _ in range(50):
                writer.emit(warning("x" * 500))

        threads = [threading.Thread(target=emit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [event.seq for event in read_events(path)[0]] == list(range(1, 201))


# -- metrics -------------------------------------------------------------------------------------------


def steps(path: Path) -> list[int]:
    return [event.step for event in read_events(path)[0] if isinstance(event, events.Metric)]


def test_metrics_come_at_most_four_a_second_with_first_and_last(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    with EventWriter(path, 1, monotonic=clock) as writer:
        for step in range(1, 1001):  # a thousand steps in ten seconds
            writer.emit(metric(step))
            clock.now += 0.01
    read = steps(path)
    assert read[0] == 1
    assert read[-1] == 1000
    assert 35 <= len(read) <= 42


def test_last_metric_of_a_block_precedes_what_follows_it(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    with EventWriter(path, 1, monotonic=clock) as writer:
        for step in (1, 2, 3):
            writer.emit(metric(step))
        writer.emit(events.BlockFinished(phase="block_ap", block=0, seconds=1.0))
        for step in (4, 5, 6):
            writer.emit(metric(step, block=1))
        writer.emit(metric(7, block=2))
    kinds = [getattr(event, "step", None) for event in read_events(path)[0]]
    assert kinds == [1, 3, None, 4, 6, 7]


def test_validation_loss_and_non_finite_flag_outlive_aggregation(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    with EventWriter(path, 1, monotonic=clock) as writer:
        writer.emit(metric(1))
        writer.emit(metric(2, loss=math.nan))
        writer.emit(metric(3))
        writer.emit(metric(4, val_loss=0.5))
        writer.emit(metric(5))
    read = [event for event in read_events(path)[0] if isinstance(event, events.Metric)]
    assert [(event.step, event.val_loss, event.non_finite) for event in read] == [
        (1, None, False),
        (4, 0.5, True),
        (5, None, False),
    ]


def test_flush_writes_the_metric_that_waits_with_its_own_time(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    with EventWriter(path, 1, monotonic=clock) as writer:
        writer.emit(metric(1))
        clock.now += 0.1
        writer.emit(metric(2))
        assert steps(path) == [1]
        clock.now += 60
        writer.flush()
        assert steps(path) == [1, 2]
        assert read_events(path)[0][-1].mono == pytest.approx(100.1)
