import tracemalloc
from pathlib import Path

import pytest

from data_prep.boxes.pictures import Found, PictureFolder


def test_a_million_pictures_are_not_all_waiting_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 20_000
    monkeypatch.setattr(PictureFolder, "_read_file", lambda _, path: Found(path, path, (1, 1), False))
    places = [[f"{number}.jpg"] for number in range(count)]
    tracemalloc.start()
    found = PictureFolder(str(tmp_path), "instances.json").read(places)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.uri for one in found if isinstance(one, Found)] == [place for (place,) in places]
    assert peak < 700 * count  # with a waiting call for each it is 2,000
