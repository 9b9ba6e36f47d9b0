"""How far a long job is, for the person who waits for it."""

import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 5.0
LINE_SHARE = 0.02
"""Lines of progress are at least `LINE_SECONDS` apart, and this share of the time so far."""
T = TypeVar("T")


class Progress:
    """How far a job is, its rate and the time left: a bar on a terminal, lines of text elsewhere."""

    def __init__(self, label: str, unit: str, total: int) -> None:
        """Start the clock; `total` counts units such as "rows"."""
        self.label, self.unit, self.total, self.done = label, unit, total, 0
        self.started = self._shown = time.monotonic()
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}", disable=None, dynamic_ncols=True)

    def add(self, count: int, note: str = "") -> bool:
        """Count finished units, in any thread; returns whether a line was due. The note is added to it."""
        with self._lock:
            self.done += count
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            now = time.monotonic()
            due = now - self._shown >= max(LINE_SECONDS, LINE_SHARE * (now - self.started))
            if due:
                self._shown = now
                if self._bar.disable and self.done < self.total:  # else `close` prints it
                    print(self._line(note), flush=True)
            return due

    def close(self, note: str = "") -> None:
        """End the bar, and print the last line."""
        self._bar.close()
        print(self._line(note), flush=True)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def end(self) -> None:
        """End the bar, and print the last line unless the job was a short one."""
        if self.seconds >= LINE_SECONDS:
            self.close()
        self._bar.close()

    def _line(self, note: str) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        if self.done >= self.total:
            state = f"{self.done:,} {self.unit} in {tqdm.format_interval(self.seconds)}"
        else:
            state = f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"
        entries = [state, f"{rate:,.1f} {self.unit}/s"]
        if 0 < self.done < self.total:
            entries.append(f"{tqdm.format_interval((self.total - self.done) / rate)} left")
        return f"{self.label}: {', '.join([*entries, *filter(None, [note])])}"


def watched(items: Iterable[T], label: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items one after another, with the progress of the work on them if it takes more than a few seconds.

    Args:
        items: any.
        label: start of the lines.
        unit: what an item is, in the plural.
        total: number of items; their length if None.
    """
    progress = Progress(label, unit, len(items) if total is None and isinstance(items, Sized) else total or 0)
    for item in items:
        yield item
        progress.add(1)
    progress.end()


@contextmanager
def working(label: str) -> Iterator[None]:
    """Tell that a step without units goes on, at growing distances, and how long it took; nothing if it is short."""
    started, done = time.monotonic(), threading.Event()

    def line(state: str) -> str:
        return f"{label}: {state}{tqdm.format_interval(time.monotonic() - started)}"

    def tell() -> None:
        while not done.wait(max(LINE_SECONDS, time.monotonic() - started)):
            print(line(""), flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
    if time.monotonic() - started >= LINE_SECONDS:
        print(line("done in "), flush=True)
