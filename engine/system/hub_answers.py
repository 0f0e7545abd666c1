"""What a hub answers where it does not give what it was asked for: found in whatever its libraries raise.

They raise many types, some of them about a cache that has nothing either; the answer is in one of the errors
behind. A hub that is overloaded, or asked too often, is asked again, after as long as it says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from engine.errors import StopRequested

Result = TypeVar("Result")
AGAIN = (429, 500, 502, 503, 504)
"""Answers after which asking again helps."""
MOST_TRIES = 5
LONGEST_WAIT_S = 30.0


class Answer(NamedTuple):
    """A status of HTTP that is none of success."""

    status: int
    wait_s: float | None = None
    """Before it may be asked again, where it says."""

    def words(self) -> tuple[str, str]:
        """What is wrong, and what to do; empty where there is nothing better to say than the error itself."""
        if self.status == 429:
            wait = f"wait {self.wait_s:.0f} s and" if self.wait_s else "wait a while and"
            return "the hub was asked too often (429)", f"{wait} run again, or `hf auth login`"
        if self.status >= 500:
            return (
                f"the hub does not work at the moment ({self.status})",
                "run again later, or name a local copy",
            )
        if self.status == 401:
            return "the hub wants to know who you are (401)", "run `hf auth login`"
        if self.status == 403:
            return "this account has no access (403)", "accept its terms on the hub, then run `hf auth login`"
        return "", ""


def answer_of(error: BaseException) -> Answer | None:
    """The answer that an error is about; None where nobody answered."""
    for one in _behind(error):
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int) and status >= 400:
            headers = getattr(response, "headers", {})
            if status in (401, 403, 404) and headers.get("X-Error-Code"):
                return None  # what it means by that (no such repository, a gated one) its libraries know
            said = str(headers.get("Retry-After", ""))
            return Answer(status, float(said) if said.isdecimal() else None)
    return None


def asking_again(action: Callable[[], Result]) -> Result:
    """``action()``, again while the hub says that it is too busy."""
    for trial in range(MOST_TRIES):
        try:
            return action()
        except StopRequested:
            raise
        except Exception as error:
            answer = answer_of(error)
            if answer is None or answer.status not in AGAIN:
                raise
            wait = 2.0**trial if answer.wait_s is None else answer.wait_s
            if wait > LONGEST_WAIT_S:
                raise
            time.sleep(wait)
    return action()


def _behind(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or one.__context__
