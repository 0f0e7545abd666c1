"""A screen over a list that others change: it is read again every few seconds, in a thread."""

from __future__ import annotations

from typing import Any

from eqat_tui.screens.base import WorkScreen

REFRESH_S = 2.0


class LookingScreen(WorkScreen):
    """Shows what :meth:`read` finds, as long as it is the screen in front."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = False
        """Whether it has been read at all."""
        self._reading = False

    def on_mount(self) -> None:
        self.query_one("#list").focus()
        self.set_interval(REFRESH_S, self.look)
        self.look()

    def on_screen_resume(self) -> None:
        super().on_screen_resume()
        self.look()

    def look(self) -> None:
        """Read again, unless that is going on."""
        if self._reading or not self.is_current:
            return
        self._reading = True

        def read() -> None:
            found = None
            try:
                found = self.read()
            except Exception as error:  # whatever it is, the next look may find it gone
                self.app.call_from_thread(self.eqat.tell, error)
            self.app.call_from_thread(self._took, found)

        self.eqat.in_thread(read)

    def _took(self, found: Any) -> None:
        self._reading, self.loaded = False, True
        self.took(found)

    def read(self) -> Any:
        """What there is; not on the app's own thread."""
        raise NotImplementedError

    def took(self, found: Any) -> None:
        """Show what was read; None where that failed."""
        raise NotImplementedError
