"""Runs that belong together: what waits in the queue and in which order, and how far each sweep is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from textual.widget import Widget

from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.queue import DOWN, UP, Queue
from eqat_tui.groups import QUEUE, Group, Row, read_groups
from eqat_tui.keys import Key, bindings
from eqat_tui.lines import line
from eqat_tui.screens.dialogs import Confirm
from eqat_tui.screens.looking import LookingScreen
from eqat_tui.screens.runs import MOST_COMPARED, Catalogue, CompareScreen
from eqat_tui.views import groups as views
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel


class QueueScreen(LookingScreen):
    """The queue and the sweeps."""

    KEYS = (
        Key("enter", "open", "open", "Open the run; of a group, show or hide its runs"),
        Key("less_than_sign", "earlier", "earlier", "Make the entry of the queue before the one above it"),
        Key("greater_than_sign", "later", "later", "Make the entry of the queue after the one below it"),
        Key("P", "pause", "pause", "Begin no other run of the queue; the one at work goes on"),
        Key("r", "resume", "resume", "Go on with the queue; give an entry that was stopped another turn"),
        Key("delete,backspace", "remove", "remove", "Take the entry out of the queue; its run stays"),
        Key("x,p", "stop", "stop", "Stop the queue and its run at work, resumably", footer=False),
        Key("space", "mark", "mark", "Mark the run for a comparison", footer=False),
        Key("equals_sign", "compare", "compare", "Compare the marked runs, or those of the group"),
    )
    ABOUT = (
        "The queue of this machine, whose runs are made one after the other, and the sweeps beside your runs."
    )
    WRITES = frozenset({"earlier", "later", "remove", "pause", "resume", "stop"})
    BINDINGS = bindings(KEYS[1:])
    DEFAULT_CSS = "QueueScreen #details { height: auto; }"

    def __init__(self) -> None:
        super().__init__()
        self._catalogue = Catalogue()
        self._groups: list[Group] = []
        self._items: list[views.Item] = []
        self._folded: set[str] = set()
        self._known: set[str] = set()
        self._marked: set[str] = set()

    def body(self) -> Iterable[Widget]:
        yield ListPanel(id="list", classes="section", title="queue and sweeps")
        yield Panel(id="details", classes="section", title="group")

    def read(self) -> list[Group]:
        return read_groups(self.eqat.runs_dir, self._catalogue.read)

    def took(self, found: list[Group] | None) -> None:
        found = found or []
        self._groups = found
        for index, group in enumerate(found):
            if group.name not in self._known:  # all but the queue and the newest sweep begin folded
                self._known.add(group.name)
                if index > 1 and not group.worker:
                    self._folded.add(group.name)
        self.refill()

    def refill(self) -> None:
        panel = self.query_one("#list", ListPanel)
        under = self._under()
        self._items = views.items(self._groups, self._folded)
        width = max(20, panel.size.width - 3)
        header, rows = views.rows(self._items, self._folded, self._marked, width)
        panel.show(rows, header=header)
        if under is not None:  # the cursor stays on its line, wherever that has moved to
            place = next((i for i, item in enumerate(self._items) if item.key == under.key), None)
            if place is not None:
                panel.move_to(place, tell=False)
        self._fill_details()
        left = sum(row.turn == "waiting" for group in self._groups for row in group.rows if group.is_queue)
        self.refresh_bars(line((f"{left} waiting ", "muted")))

    def _fill_details(self) -> None:
        width = self.size.width
        shown = views.details(self._under(), width) if self.loaded else views.nothing_here(width)
        self.query_one("#details", Panel).show(shown)

    def _under(self) -> views.Item | None:
        """What is under the cursor."""
        cursor = self.query_one("#list", ListPanel).cursor
        return self._items[cursor] if cursor < len(self._items) else None

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        self._fill_details()
        self.refresh_bars()

    async def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        await self.action_do("open")

    # -- keys --------------------------------------------------------------------------------------

    def impossible(self, action: str) -> str:
        item = self._under()
        row = item.row if item is not None else None
        if action in ("earlier", "later", "remove"):
            if item is None or not item.group.is_queue or row is None:
                return "no entry of the queue is under the cursor"
            if row.turn == "now":
                return "its run is at work"
            if action == "remove":
                return ""
            return "its turn is over" if row.turn == "over" else views.at_the_end(item.group, row, action)
        if action == "mark":
            return "" if row is not None and row.run is not None else "no run is under the cursor"
        if action == "compare":
            return "" if len(self._compared()) >= 2 else "it needs two runs; space marks them"
        if action == "resume" and item is not None and not item.group.is_queue:
            return f"that is for the queue; eqat sweep resume {item.group.name} goes on with a sweep"
        if action in ("resume", "stop") and not self._queue().rows:
            return "the queue is empty"
        if action in ("pause", "stop"):
            return "the queue is paused already" if self._queue().paused and action == "pause" else ""
        if action == "open" and row is not None and row.run is None:
            return "this run is not made yet" if row.turn == "waiting" else "there is no run"
        return ""

    def _queue(self) -> Group:
        """The queue's group; an empty one before the first look."""
        found = (group for group in self._groups if group.is_queue)
        return next(found, Group(QUEUE, QUEUE, "", (), False, False, ""))

    def _entry(self) -> Row:
        """The entry of the queue under the cursor."""
        item = self._under()
        assert item is not None
        assert item.row is not None
        return item.row

    def do_open(self) -> None:
        item = self._under()
        if item is None:
            return
        if item.row is None:
            self._folded ^= {item.group.name}
            self.refill()
            return
        run = item.row.run
        assert run is not None
        self.eqat.open_run(RunDirectory.open(run.path), mode="result" if item.row.done else "monitor")

    def do_earlier(self) -> None:
        self._move(UP)

    def do_later(self) -> None:
        self._move(DOWN)

    def _move(self, where: str) -> None:
        number = self._entry().number
        self._change(lambda queue: queue.move(number, where))

    def do_remove(self) -> None:
        row = self._entry()

        def remove(yes: bool | None) -> None:
            if yes:
                words = f"took entry {row.number} out of the queue"
                self._change(lambda queue: queue.remove([row.number]), words)

        stays = "Its run stays." if row.run is not None else "Nothing was made of it yet."
        question = f"Take entry {row.number}, {row.what}, out of the queue?"
        self.app.push_screen(Confirm(question, stays, "take it out"), remove)

    def _change(self, change: Callable[[Queue], Any], done: str = "") -> None:
        """Change the queue on a thread: another change may be on its way."""

        def work() -> None:
            queue = Queue()
            with queue.changing():
                queue.settle()
                change(queue)
            self.app.call_from_thread(self.look)

        self.eqat.in_background(work, done)

    def do_pause(self) -> None:
        from eqat_tui import queueing

        self._act(queueing.paused, "no other run is begun; r goes on")

    def do_stop(self) -> None:
        from eqat_tui import queueing

        def stop(yes: bool | None) -> None:
            if yes:
                self._act(queueing.stopped, "no other run is begun, and the one at work stops; r goes on")

        consequence = (
            "The run at work stops at its next step, resumably, and no other is begun. r goes on with it."
        )
        self.app.push_screen(Confirm("Stop the queue?", consequence, "stop it"), stop)

    def do_resume(self) -> None:
        from eqat_tui import queueing

        item = self._under()
        row = item.row if item is not None and item.group.is_queue else None
        again = [row.number] if row is not None and row.turn == "over" and not row.done else []
        words = f"entry {again[0]} has another turn" if again else "the queue goes on"
        self._act(lambda queue: queueing.resumed(queue, again), words)

    def _act(self, act: Callable[[Queue], Any], done: str) -> None:
        def work() -> None:
            act(Queue())
            self.app.call_from_thread(self.look)

        self.eqat.in_background(work, done)

    def do_mark(self) -> None:
        run = self._entry().run
        assert run is not None
        if run.id not in self._marked and len(self._marked) >= MOST_COMPARED:
            self.notify(f"at most {MOST_COMPARED} runs are compared", severity="warning")
            return
        self._marked ^= {run.id}
        self.refill()
        self.query_one("#list", ListPanel).action_move(1)

    def _compared(self) -> list[Row]:
        """The marked runs; without any, those of the group under the cursor that have results."""
        item = self._under()
        if self._marked:
            every = [row for group in self._groups for row in group.rows]
            found = [row for row in every if row.run is not None and row.run.id in self._marked]
        else:
            rows = item.group.rows if item is not None else ()
            found = [row for row in rows if row.run is not None and row.turn == "over"]
        return list({row.run.path: row for row in found if row.run is not None}.values())

    def do_compare(self) -> None:
        item, found = self._under(), self._compared()
        chosen = views.compared(found, MOST_COMPARED, newest_first=item is None or item.group.is_queue)
        try:
            runs = [RunDirectory.open(row.run.path) for row in chosen if row.run is not None]
        except EqatError as error:
            self.eqat.tell(error)
            return
        if len(chosen) < len(found) and item is not None:
            words = views.left_out(item.group, len(found), len(chosen))
            self.notify(words, severity="warning", timeout=12)
        self.app.push_screen(CompareScreen(runs))
