"""The machine as the memory screen shows it."""

from __future__ import annotations

from collections.abc import Sequence

from eqat_tui.charts import Series
from eqat_tui.hardware import Gpu, Process, Reading
from eqat_tui.lines import Line, Span, bar, columns, cut, line, widths_of, wrap
from eqat_tui.output import format_bytes


def machine(reading: Reading, width: int) -> list[Line]:
    """A bar for each GPU, or why there is none; host memory, load and disk."""
    lines: list[Line] = []
    for gpu in reading.gpus:
        lines += _gpu(gpu, width)
    if not reading.gpus:
        lines += wrap(f"GPU   none: {reading.gpu_problem}; runs use the CPU", width, "muted")
    host = reading.host
    swap = f", {format_bytes(host.swap_used)} swapped" if host.swap_used else ""
    load = f", load {host.load:.1f}" if host.load is not None else ""
    memory = f"{format_bytes(host.used)} of {format_bytes(host.total)}{swap}"
    lines.append(_bar("host  ", host.used / host.total if host.total else None, memory, width))
    lines.append(_bar("cores ", host.cpu / 100, f"{host.cpu:.0f} % of {host.cores}{load}", width))
    used = 1 - host.disk_free / host.disk_total if host.disk_total else None
    lines.append(_bar("disk  ", used, f"{format_bytes(host.disk_free)} free", width))
    return lines


def _gpu(gpu: Gpu, width: int) -> list[Line]:
    facts = [f"{gpu.utilization:.0f} %" if gpu.utilization is not None else ""]
    facts.append(f"{gpu.temperature:.0f} °C" if gpu.temperature is not None else "")
    limit = f" of {gpu.power_limit:.0f}" if gpu.power_limit is not None else ""
    facts.append(f"{gpu.power:.0f}{limit} W" if gpu.power is not None else "")
    words = f"{format_bytes(gpu.used)} of {format_bytes(gpu.total)}"
    head = line(
        (f"GPU {gpu.index} ", "strong"), (gpu.name, ""), "  ", ("  ".join(filter(None, facts)), "muted")
    )
    return [cut(head, width), _bar("      ", gpu.used / gpu.total if gpu.total else None, words, width)]


def _bar(name: str, share: float | None, words: str, width: int) -> Line:
    room = max(6, width - len(name) - 34)
    role = (
        "bad"
        if share is not None and share > 0.95
        else "warn"
        if share is not None and share > 0.85
        else "accent"
    )
    return cut([(name, "strong"), *bar(share, room, role), ("  ", ""), (words, "")], width)


def processes(reading: Reading, width: int) -> tuple[Line, list[Line]]:
    """Who uses the GPUs, and our engines wherever they run."""
    names: list[str | Span] = ["where", "process", "memory", "what", "user"]
    cells: list[list[str | Span]] = []
    on_gpu = set()
    for gpu in reading.gpus:
        for one in gpu.processes:
            on_gpu.add(one.pid)
            cells.append(_cells(f"GPU {gpu.index}", one))
    cells += [_cells("host", one) for one in reading.engines]
    table = [names, *cells]
    sizes = widths_of(table)
    # What a process is called can be long; whose it is must not fall off the edge.
    sizes[3] = max(8, min(sizes[3], width - sum(sizes[:3]) - sizes[4] - 8))
    made = columns(table, sizes, right="lrr")
    return cut(made[0], width), [cut(row, width) for row in made[1:]]


def _cells(where: str, one: Process) -> list[str | Span]:
    what: Span = (f"▶ {one.run}", "accent") if one.engine else (one.name or "another container's", "muted")
    return [where, str(one.pid), format_bytes(one.bytes), what, (one.user, "muted")]


def history(readings: Sequence[Reading]) -> tuple[str, list[Series], float]:
    """Memory over time, GiB: of each GPU, or of the host; and how high the scale goes."""
    if not readings:
        return "memory, GiB", [Series("host", [])], 1.0
    last = readings[-1]
    if last.gpus:
        series = [
            Series(
                f"GPU {gpu.index}",
                [
                    (round(one.t - last.t), one.gpus[place].used / 2**30 if place < len(one.gpus) else None)
                    for one in readings
                ],
                f"series{place % 4 + 1}",
            )
            for place, gpu in enumerate(last.gpus[:4])
        ]
        return "GPU memory, GiB", series, max(gpu.total for gpu in last.gpus) / 2**30
    used = [(round(one.t - last.t), one.host.used / 2**30) for one in readings]
    return "host memory, GiB", [Series("host", used, "series3")], last.host.total / 2**30
