import os
from typing import Any

import pytest
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from workflows.common import quiet

NATIVE = "[2026-11-29 17:45:34,346 E 6855 6855] core_worker.cc:2465: Actor with class name: 'MapWorker' has ..."


def test_lines_of_rays_native_code_are_dropped_and_others_stay() -> None:
    printed: list[dict[str, Any]] = []
    dispatcher.add_handler("probe", printed.append)
    try:
        quiet.drop_native_lines()
        dispatcher.emit({"pid": 7, "is_err": True, "lines": [NATIVE, "codet boxes 5/5", "[2026-11-29] a line of ours"]})
        dispatcher.emit({"pid": 7, "is_err": True, "lines": [NATIVE]})
    finally:
        dispatcher.remove_handler("probe")
    assert [data["lines"] for data in printed] == [["codet boxes 5/5", "[2026-11-29] a line of ours"]]
    assert printed[0]["pid"] == 7


def test_native_code_is_silent_only_inside_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before ")
    with pytest.raises(RuntimeError), quiet.native_code():
        os.write(2, b"inside ")
        raise RuntimeError
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"
