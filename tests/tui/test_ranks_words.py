"""What is said of a run on several GPUs: each one, the slowest, and whose memory was the most."""

from __future__ import annotations

from logs import GIB, Log

from engine.run import events
from engine.run.shown import render
from engine.run.state import RunState
from eqat_tui.display import lasting_line, measurements
from eqat_tui.feed import RunView
from eqat_tui.lines import plain
from eqat_tui.ranks_text import slowest
from eqat_tui.report.sections import _phases
from eqat_tui.run_text import facts
from eqat_tui.views import run_machine


def reading(rank: int, waited: float | None, peak: int) -> events.RankReading:
    return events.RankReading(
        rank=rank,
        gpu_used=peak - GIB,
        gpu_total=80 * GIB,
        gpu_peak=peak,
        gpu_utilization=90.0,
        host_used=2 * GIB,
        host_peak=3 * GIB,
        waited=waited,
    )


RANKS = (reading(0, 0.009, 10 * GIB), reading(1, 0.002, 12 * GIB), reading(2, 0.008, 11 * GIB))
PEAKS = tuple(
    events.RankPeaks(rank=one.rank, peak_gpu_bytes=one.gpu_peak, peak_host_bytes=one.host_peak)
    for one in RANKS
)


def log_of_three(*, ends: bool) -> Log:
    log = Log()
    log.attempt_begins("run")
    log.phase("block_ap")
    log.add(events.Memory(gpu_used=9 * GIB, gpu_total=80 * GIB, gpu_peak=10 * GIB, host_used=1, ranks=RANKS))
    if ends:
        log.add(
            events.PhaseFinished(
                phase="block_ap",
                seconds=5.0,
                peak_gpu_bytes=12 * GIB,
                peak_host_bytes=3 * GIB,
                ranks=PEAKS,
            )
        )
    return log


def test_the_monitor_shows_every_gpu_and_the_slowest() -> None:
    log = log_of_three(ends=False)
    state = RunState().apply_all(log.events)
    view = RunView(id="run", path="/run", state=state, liveness="running", now=log.t)
    lines = [plain(spans) for spans in run_machine.machine_lines(view, 120)]
    ranks = [text for text in lines if text.strip().startswith("rank ")]
    assert [text.split()[1] for text in ranks] == ["0", "1", "2"]
    assert ["the slowest" in text for text in ranks] == [False, True, False]
    assert "11 GiB of 80 GiB" in ranks[1].replace(".00", "").replace(".0", "")
    assert "waited 2 ms" in ranks[1]
    assert "rank 1 of 3 is the slowest" in measurements(state)


def test_nobody_is_called_the_slowest_where_all_wait_alike_or_one_was_not_heard_of() -> None:
    assert slowest((reading(0, 0.009, GIB), reading(1, 0.008, GIB))) is None
    assert slowest((reading(0, 0.009, GIB), reading(1, None, GIB))) is None
    assert slowest(()) is None


def test_the_result_says_whose_peak_was_the_largest() -> None:
    for ends in (True, False):
        state = RunState().apply_all(log_of_three(ends=ends).events).accounted()
        shown = render(state, state="done") | {"path": "/run"}
        (row,) = (phase for phase in shown["phases"] if phase["name"] == "block_ap")
        assert row["peak_gpu_bytes"] == 12 * GIB
        assert [one["peak_gpu_bytes"] for one in row["ranks"]] == [10 * GIB, 12 * GIB, 11 * GIB]
        words = facts(shown)["peak memory"]
        assert "12.0 GiB (rank 1; rank 0: 10.0 GiB, 2: 11.0 GiB)" in words
        assert "(rank 1; rank 0: 10.0 GiB, 2: 11.0 GiB)" in str(_phases(state))


def test_a_run_on_one_gpu_says_nothing_of_ranks() -> None:
    log = Log()
    log.attempt_begins("run")
    log.phase("block_ap")
    log.memory()
    log.phase_ends("block_ap", 5.0)
    state = RunState().apply_all(log.events)
    shown = render(state, state="done") | {"path": "/run"}
    assert all(phase["ranks"] == [] for phase in shown["phases"])
    assert "rank" not in facts(shown)["peak memory"]
    view = RunView(id="run", path="/run", state=state, liveness="running", now=log.t)
    assert "rank" not in "".join(plain(spans) for spans in run_machine.machine_lines(view, 120))
    assert lasting_line(log.events[-1]) == "✓ Block-AP: 5.0 s, peak GPU 3.00 GiB, memory 2.00 GiB"
