"""Limits and history of a host: requests at a time, pauses it asked for, and whether it still answers."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from data_prep.pairs.addresses import REMEMBERED_HOSTS, FetchError

SILENCE = ("timeout", "connect", "dns")
"""Failures that count against a whole host."""
GIVEN_UP_SECONDS = 300.0
"""After this time, one URL may test whether a host answers again."""


@dataclass(kw_only=True)
class Host:
    """A host and port."""

    name: str
    max_failures: int
    """See `fetch.FetchConfig.host_failures`."""
    slots: asyncio.Semaphore
    users: int = 0
    """URLs that hold a slot or wait for one."""
    paused_until: float = 0.0
    """Time before which it asked for no requests (`Retry-After`)."""
    _trying: int = 0
    """URLs admitted and not settled yet, including pauses between attempts."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set for an instant when waiting URLs should check again whether there is room."""
    _last_answer: float = 0.0
    _failures: int = 0
    """URLs in a row that failed with `SILENCE`."""
    _last_failure: FetchError | None = None
    _given_up_until: float = 0.0

    def has_room(self) -> bool:
        """Whether one more URL may be tried: on a host that has never answered, at most `max_failures` are."""
        limit = max(1, self.max_failures)
        return bool(self._last_answer) or self._failures >= limit or self._trying + self._failures < limit

    async def admit(self) -> None:
        """Wait until there is room for a URL."""
        while not self.has_room():
            await self._changed.wait()
        self._trying += 1

    def leave(self) -> None:
        """Remove an admitted URL."""
        self._trying -= 1
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed.clear()

    async def wait_for_pause(self, remaining: float) -> float:
        """Wait as long as the host asked for; returns the seconds that remain of `remaining`.

        Raises:
            FetchError: the pause is longer than `remaining`.
        """
        while (wait := self.paused_until - time.monotonic()) > 0:
            if wait > remaining:
                raise FetchError("http_status", f"{self.name} asked for a pause of {wait:.0f} s more", refusal=True)
            await asyncio.sleep(wait)
            remaining -= wait
        return remaining

    def check_alive(self) -> None:
        """Raise FetchError if the host was given up; after `GIVEN_UP_SECONDS` let one URL through."""
        now = time.monotonic()
        if self._last_failure and self._failures >= self.max_failures:
            if now < self._given_up_until:
                history = f"{self._failures} failures in a row: {self._last_failure.detail}"
                raise FetchError(self._last_failure.reason, f"{self.name} was given up after {history}", refusal=True)
            self._given_up_until = now + GIVEN_UP_SECONDS

    def record(self, failure: FetchError | None, began: float) -> None:
        """Record the result of a URL whose requests began at a given time; None is success.

        Silence counts only if the host answered no other URL since: failures take longest, so they tend to come last.
        """
        now = time.monotonic()
        if failure is None or failure.answered or failure.reason not in SILENCE:
            self._failures, self._last_answer = 0, now
            self._notify()
        elif began >= self._last_answer:
            self._failures, self._last_failure = self._failures + 1, replace(failure)
            self._given_up_until = now + GIVEN_UP_SECONDS


class Hosts:
    """All hosts met; the least recently used idle ones are forgotten beyond `REMEMBERED_HOSTS`."""

    def __init__(self, *, slots: int, max_failures: int) -> None:
        self._slots, self._max_failures = slots, max_failures
        self.by_name: OrderedDict[str, Host] = OrderedDict()

    def get(self, name: str) -> Host:
        """The host of a name (with port)."""
        if name not in self.by_name:
            slots = asyncio.Semaphore(self._slots)
            self.by_name[name] = Host(name=name, max_failures=self._max_failures, slots=slots)
            while len(self.by_name) > REMEMBERED_HOSTS and not self.by_name[oldest := next(iter(self.by_name))].users:
                del self.by_name[oldest]
        self.by_name.move_to_end(name)
        return self.by_name[name]
