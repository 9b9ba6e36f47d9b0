"""Tables without rows are refused in one line, before any work."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from serving import save_classifier, save_detector_of_any_name

from data_prep import tables
from data_prep.embeddings.teachers import EmbedConfig
from ovd_models.errors import InputError
from ovd_models.vild.model import ViLD, ViLDConfig
from workflows import codet, embed, failures, ovsam, vild
from workflows.configs import codet as codet_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.configs import vild as vild_configs
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.inputs import codet as codet_inputs
from workflows.inputs import vild as vild_inputs
from workflows.reports import evaluation
from workflows.studies import vild_sweep

BOX = {
    "image_id": "a",
    "source_id": 1,
    "uri": "a.jpg",
    "width": 64,
    "height": 64,
    "boxes": [[1, 1, 40, 40]],
    "category_ids": [1],
    "iscrowd": [False],
    "masks": [""],
    "neg_category_ids": [],
    "not_exhaustive_category_ids": [],
}
CAT = {"category_id": 1, "name": "cat", "synonyms": [], "frequency": "f", "split": "base", "image_count": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with tables without rows, `none` also without names, a CLIP and a ViLD of that CLIP.

    Of `blind` and `lone` only the table for evaluation has no rows, or is missing.
    """
    root = tmp_path_factory.mktemp("empty")
    for table, name, rows in (
        ("categories", "none", []),
        ("categories", "hollow", [CAT]),
        *(("boxes", f"{name}-{part}", []) for name in ("none", "hollow") for part in ("train", "eval")),
        *(("categories", name, [CAT]) for name in ("blind", "lone")),
        *(("boxes", f"{name}-train", [BOX]) for name in ("blind", "lone")),
        ("boxes", "blind-eval", []),
        *((table, "hollow", []) for table in ("pairs", "groups", "concepts")),
    ):
        content = pa.Table.from_pylist(rows, schema=tables.SCHEMAS[table])
        part = tables.write_part(str(root), table, name, "part-0.parquet", content)
        tables.publish(str(root), table, name, [part], producer="test", config_hash="")
    save_classifier(root / "clip")
    save_detector_of_any_name(root / "vild", ViLD(ViLDConfig()))
    return root


@pytest.mark.parametrize(
    ("boxes", "message"), [("none", "categories/none: no base or novel name"), ("hollow", "boxes/hollow-train: no ")]
)
def test_trainings_refuse_them(place: Path, boxes: str, message: str) -> None:
    given = {"storage": str(place), "boxes": boxes, "teacher": str(place / "clip")}
    with pytest.raises(InputError, match=message):
        vild.train(dataclasses.replace(vild_configs.smoke(), **given))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        ovsam.train(dataclasses.replace(ovsam_configs.smoke(), text_to_mask=False, **given))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        codet.train(dataclasses.replace(codet_configs.smoke(), pairs="hollow", **given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [("blind", "boxes/blind-eval: no images to evaluate on"), ("lone", "boxes/lone-eval: no such table")],
)
def test_detectors_are_not_trained_without_a_set_to_evaluate_on(place: Path, boxes: str, message: str) -> None:
    given = {"storage": str(place), "boxes": boxes, "teacher": str(place / "clip")}
    with pytest.raises(InputError, match=message):
        vild_inputs.read_inputs(dataclasses.replace(vild_configs.smoke(), **given))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        codet_inputs.read_inputs(dataclasses.replace(codet_configs.smoke(), pairs="hollow", **given))  # type: ignore[arg-type]


def test_a_model_is_continued_with_its_own_teacher_only(place: Path) -> None:
    given = {"storage": str(place), "boxes": "blind", "teacher": str(place / "clip")}
    run = dataclasses.replace(vild_configs.smoke(), box_model=str(place / "vild"), **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--box-model \S+vild: trained with teacher clip:tiny, expected clip:"):
        vild_inputs.read_inputs(run)


def test_evaluations_and_embeddings_refuse_them(place: Path) -> None:
    detector = {"storage": str(place), "model": str(place / "vild"), "boxes": "hollow-eval"}
    expected = "boxes/hollow-eval: no images, expected at least one"
    with pytest.raises(InputError, match=expected):
        evaluation.evaluate(EvaluationRun(**detector))  # type: ignore[arg-type]
    run = vild_sweep.Run(**detector)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=expected):
        vild_sweep.record(run.load_detector(), run)
    with pytest.raises(InputError, match=r"no images|expected the detector's teacher"):
        failures.find_failures(failures.Run(**detector, teacher=str(place / "clip")))  # type: ignore[arg-type]
    for table, source in (("regions", {"boxes": "hollow-train"}), ("embeddings", {"pairs": "hollow"})):
        own = embed.Run(
            storage=str(place), teacher=str(place / "clip"), name="none", embed=EmbedConfig(actors=0), **source
        )
        with pytest.raises(InputError, match=r"(boxes|pairs)/hollow\S*: no images, expected at least one"):
            embed.embed(own)
        assert tables.find_manifest(str(place), table, "none") is None  # type: ignore[arg-type]
