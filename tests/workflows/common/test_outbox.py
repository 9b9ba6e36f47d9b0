import time

import pytest

from workflows.common import outbox
from workflows.common.outbox import Outbox


class Server:
    """Takes numbers while it is up; refuses negative ones."""

    def __init__(self) -> None:
        self.up, self.taken, self.calls = True, list[int](), 0

    def take(self, number: int) -> None:
        self.calls += 1
        if not self.up:
            raise ConnectionError("connection refused\nby the test")
        if number < 0:
            raise ValueError(f"{number} is negative")
        self.taken.append(number)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.02)
    return Server()


@pytest.fixture
def box(server: Server) -> Outbox:
    return Outbox("the server", lambda error: isinstance(error, ConnectionError), patience=0.3)


def test_calls_are_kept_in_order_until_the_server_answers(
    server: Server, box: Outbox, capsys: pytest.CaptureFixture[str]
) -> None:
    box.send(lambda: server.take(1))
    assert server.taken == [1]
    server.up = False
    for number in (2, 3):
        box.send(lambda number=number: server.take(number))  # type: ignore[misc]
    box.put(lambda: server.take(4))
    time.sleep(0.1)
    assert server.taken == [1]
    server.up = True
    box.wait()
    assert server.taken == [1, 2, 3, 4]
    assert capsys.readouterr().out == ""


def test_calls_to_a_server_that_stays_away_are_given_up_in_one_line(
    server: Server, box: Outbox, capsys: pytest.CaptureFixture[str]
) -> None:
    server.up = False
    deliveries = [box.put(lambda: server.take(1)) for _ in range(3)]
    started = time.monotonic()
    for delivery in deliveries:
        delivery.result()
    assert time.monotonic() - started < 1
    message = "the server is away: 3 results were not sent to it (connection refused)\n"
    assert capsys.readouterr().out == message
    server.up = True
    box.send(lambda: server.take(5))
    box.wait()
    assert server.taken == [5]


def test_a_refused_call_is_raised_and_does_not_hold_up_others(server: Server, box: Outbox) -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        box.send(lambda: server.take(-1))
    refused, taken = box.put(lambda: server.take(-2)), box.put(lambda: server.take(2))
    taken.result()
    assert server.taken == [2]
    with pytest.raises(ValueError, match="-2 is negative"):
        refused.result()


def test_an_outbox_without_calls_ends_at_once(box: Outbox) -> None:
    started = time.monotonic()
    box.wait()
    assert time.monotonic() - started < 0.1
