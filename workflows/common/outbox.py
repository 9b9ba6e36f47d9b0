"""Calls to a tracking server that may be away for a while: they are kept, and made in order when it answers."""

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from workflows.common import quiet

RETRY_SECONDS = 5.0
"""Pause after a call that got no answer."""
END_SECONDS, FILE_END_SECONDS = 60.0, 5.0
"""How long the end of a job waits for a server, and for a database on a disk, that is away."""


@dataclass
class Delivery:
    """A call that is made later."""

    call: Callable[[], object]
    outbox: "Outbox"
    error: Exception | None = field(default=None)
    """Why the server refused it."""

    def result(self) -> None:
        """Return when the call is made or given up; raises the server's refusal."""
        self.outbox.wait()
        if self.error is not None:
            raise self.error


class Outbox:
    """Makes calls in their order, each until the server answers.

    Example:
        >>> outbox.send(partial(client.log_batch, run_id, metrics))  # now, if the server answers
        >>> outbox.wait()  # at the end of the job
    """

    def __init__(self, server: str, is_outage: Callable[[Exception], bool], patience: float) -> None:
        """Start empty.

        Args:
            server: its name in the message about calls that were given up.
            is_outage: whether an error means that the server is away, not that it refuses the call.
            patience: how many seconds `wait` waits for a server that is away.
        """
        self._server, self._is_outage, self._patience = server, is_outage, patience
        self._waiting: deque[Delivery] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._outage: Exception | None = None

    def send(self, call: Callable[[], object]) -> None:
        """Make a call now or, while the server is away, later.

        Raises:
            Exception: the server refused a call that was made now.
        """
        if not self._waiting:
            try:
                call()
                return
            except Exception as error:
                if not self._is_outage(error):
                    raise
        self.put(call)

    def put(self, call: Callable[[], object]) -> Delivery:
        """Make a call in the background."""
        delivery = Delivery(call, self)
        with self._changed:
            self._waiting.append(delivery)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
                atexit.register(self.wait)
        return delivery

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                delivery = self._waiting[0]
            outage = self._attempt(delivery)
            with self._changed:
                self._outage = outage
                if outage is None and self._waiting and self._waiting[0] is delivery:
                    self._waiting.popleft()
                self._changed.notify_all()
            if outage is not None:
                time.sleep(RETRY_SECONDS)

    def _attempt(self, delivery: Delivery) -> Exception | None:
        """Make a call; returns the error if the server is away."""
        try:
            delivery.call()
        except Exception as error:
            if self._is_outage(error):
                return error
            delivery.error = error
        return None

    def wait(self) -> None:
        """Return when all calls are made; if the server stays away, give them up and say so in one line."""
        deadline = time.monotonic() + self._patience
        with self._changed:
            while self._waiting and (self._outage is None or time.monotonic() < deadline):
                self._changed.wait(0.1)
            left = len(self._waiting)
            self._waiting.clear()
        if left:
            reason = quiet.hide_logins(next(iter(str(self._outage).splitlines()), ""))
            with contextlib.suppress(ValueError):  # the console is closed
                print(f"{self._server} is away: {left} results were not sent to it ({reason})", flush=True)
