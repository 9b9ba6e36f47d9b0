import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_prep.pairs.scores import ClipScorer, ScoreConfig, ScoreStage, load_scorer
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.errors import InputError


class Redness:
    """A scorer of the kind that users write."""

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def rows(colours: Sequence[str | None]) -> pa.Table:
    """Rows as the filters leave them; None is a row that was rejected before."""
    count = len(colours)
    return pa.table(
        {
            "row": list(range(count)),
            "caption": ["a photo of a cat"] * count,
            "content": pa.array([colour and jpeg(colour) for colour in colours], pa.large_binary()),
            "stage": pa.array([None if colour else "fetch" for colour in colours], pa.string()),
            "reason": pa.array([None if colour else "dns" for colour in colours], pa.string()),
            "detail": pa.array([None] * count, pa.string()),
        }
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(Clip(ClipConfig()), folder)
    return str(folder)


def test_a_scorer_of_the_users_own_rejects_what_scores_less() -> None:
    config = ScoreConfig(scorers={"red": f"{__name__}:Redness"}, minimum={"red": 0.5})
    found = ScoreStage(config)(rows(["red", None, "blue"])).to_pylist()
    assert [row["reason"] for row in found] == [None, "dns", "low_score"]
    assert [row["stage"] for row in found] == [None, "fetch", "filter"]
    assert found[2]["detail"].startswith("red 0.00")
    assert found[0]["score_red"] > 0.95
    assert found[1]["score_red"] is None


def test_clip_scores_are_cosines_of_image_and_caption(checkpoint: str) -> None:
    scorer = ClipScorer(checkpoint)
    images = [Image.new("RGB", (80, 40), colour) for colour in ("red", "blue", "white")]
    captions = ["a red thing", "a blue thing", "nothing"]
    found = scorer(images, captions)
    one_by_one = [scorer([image], [caption])[0] for image, caption in zip(images, captions, strict=True)]
    assert found == pytest.approx(one_by_one, abs=1e-5)
    assert all(-1 <= value <= 1 for value in found)
    assert np.linalg.norm(scorer.embed(images), axis=1) == pytest.approx([1, 1, 1], abs=1e-5)


@pytest.mark.parametrize("resize_mode", ["squash", "shortest", "longest"])
def test_images_are_scored_as_the_model_was_trained(
    resize_mode: Literal["squash", "shortest", "longest"], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Clip(ClipConfig(resize_mode=resize_mode)).eval()
    save_clip(model, tmp_path)
    y, x = np.mgrid[0:60, 0:140]
    image = Image.fromarray(np.stack((4 * y, x, x + y), axis=2).astype(np.uint8))
    with torch.inference_mode():
        expected = model.encode_images(model.prepare([image]))[0].numpy()  # open_clip's own transform
    assert float(ClipScorer(str(tmp_path)).embed([image])[0] @ expected) > 0.9999


def test_embeddings_stand_beside_kept_rows_as_float16(checkpoint: str) -> None:
    found = ScoreStage(ScoreConfig(), checkpoint)(rows(["red", None, "red"]))["embedding"].to_pylist()
    assert found[1] is None
    assert found[0] == found[2]
    assert np.frombuffer(found[0], "<f2").shape == (128,)
    assert np.linalg.norm(np.frombuffer(found[0], "<f2").astype(float)) == pytest.approx(1, abs=1e-2)


def test_rows_without_an_image_pass(checkpoint: str) -> None:
    for table in (rows([None, None]), rows([])):
        found = ScoreStage(ScoreConfig(scorers={"clip": checkpoint}, minimum={"clip": 2.0}), checkpoint)(table)
        assert found.num_rows == table.num_rows
        assert found["reason"].to_pylist() == table["reason"].to_pylist()


def test_nan_is_not_enough() -> None:
    config = ScoreConfig(scorers={"odd": f"{__name__}:Odd"}, minimum={"odd": 0.0})
    assert ScoreStage(config)(rows(["red"]))["reason"].to_pylist() == ["low_score"]


class Odd:
    """A scorer that fails quietly."""

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return [float("nan") for _ in images]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "no_such_module:Scorer",
            "scorer no_such_module:Scorer: No module named 'no_such_module', expected module:Class",
        ),
        ("math:Scorer", "has no attribute 'Scorer', expected module:Class"),
        ("nowhere", "no CLIP checkpoint"),
    ],
)
def test_a_missing_scorer_is_told(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_scorer(model, "cpu")


def test_a_limit_needs_its_scorer() -> None:
    with pytest.raises(InputError, match=r"--scores\.minimum clip: no such scorer"):
        ScoreConfig(minimum={"clip": 0.2})
    with pytest.raises(InputError, match=r"--scores\.scorers 'a b'"):
        ScoreConfig(scorers={"a b": "x"})
