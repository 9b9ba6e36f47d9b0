import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distinct_regions import spread_out
from PIL import Image

import ovd_models
from ovd_models.checkpoint_info import write_calibration
from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskModelConfig
from ovd_models.sam.model import SamConfig
from workflows import export
from workflows.export import Run

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["detect.py", *sys.argv[2:]]
runpy.run_path(FOLDER + "/detect.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder, clip = tmp_path_factory.mktemp("codet"), Clip(ClipConfig()).eval()
    encoder = ClipTextEncoder(clip.config, clip.model.text, "any")
    splits = {"anchor": "base", "cat": "novel"}
    save_checkpoint(spread_out(CoDet(CoDetConfig())), encoder, folder, splits=splits, run={})
    return folder


def test_exported_files_find_what_the_library_does_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 4), np.uint8)
    pixels[:, 60:, 3] = 0
    turned, picture, out = Image.Exif(), tmp_path / "picture.png", tmp_path / "exported"
    turned[0x0112] = 6
    Image.fromarray(pixels).save(picture, exif=turned)
    scores = ovd_models.load(checkpoint).detect(picture, ["cat"], score_threshold=0.0).scores
    checkpoint = shutil.copytree(checkpoint, tmp_path / "calibrated")
    write_calibration(checkpoint, float(scores.median()), "any")
    differences = export.export(Run(model=str(checkpoint), out=str(out), num_images=3))
    assert set(differences) == {"detector.onnx", "text_tower.onnx"}
    assert json.loads((out / "export.json").read_text())["max_difference"] == differences
    code = WITHOUT_TORCH.replace("FOLDER", repr(str(out)))
    command = [sys.executable, "-c", code, "x", str(picture), "cat"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = ovd_models.load(checkpoint).detect(picture, ["cat"])
    assert 0 < len(found) < len(scores)
    expected = zip(found.scores.tolist(), found.boxes.round().int().tolist(), strict=True)
    assert printed == [f"{'cat':20} {score:.2f}  {box}" for score, box in expected]
    for more, message in (
        ([str(picture), "unicorn"], "'unicorn': not embedded in names.npz, expected some of anchor, cat"),
        ([], f"usage: python {out}/detect.py PICTURE [NAME ...]"),
    ):
        failed = subprocess.run([*command[:4], *more], capture_output=True, text=True, check=False)
        assert (failed.returncode, failed.stderr.splitlines()) == (1, [message])


def test_bad_input_is_one_line_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = tmp_path / "other"
    clip = Clip(ClipConfig()).eval()
    encoder = ClipTextEncoder(clip.config, clip.model.text, "any")
    save_checkpoint(TextToMask(TextToMaskModelConfig()), encoder, other, splits={}, run={})
    (tmp_path / "nameless").mkdir()
    save_checkpoint(CoDet(CoDetConfig()), encoder, tmp_path / "nameless", splits={}, run={})
    out = str(tmp_path / "out")
    for model, given, message in (
        ("", out, "--model: missing"),
        (str(checkpoint), "", "--out: missing"),
        (str(checkpoint), str(checkpoint), "a new or an empty folder"),
        (str(tmp_path / "absent"), out, "absent"),
        (str(other), out, "method 'text_to_mask', expected a CoDet, a ViLD, an OV-SAM, a CLIP or a SAM"),
        (str(tmp_path / "nameless"), out, "no default names"),
    ):
        with pytest.raises(InputError, match=message):
            export.export(Run(model=model, out=given, num_images=1))
    assert not Path(out).exists()
    assert not list(tmp_path.glob(".*"))


def test_a_clip_is_two_towers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = Clip(ClipConfig()).eval()
    save_clip(clip, tmp_path / "clip")
    run = Run(model=str(tmp_path / "clip"), out=str(tmp_path / "out"), torch_export=True)
    files = [f"{tower}_tower.{ending}" for tower in ("image", "text") for ending in ("onnx", "pt2")]
    assert sorted(export.export(run)) == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", *files]
    program = torch.export.load(tmp_path / "out/image_tower.pt2").module()
    images = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)  # a number of images that was not captured
    assert torch.allclose(program(images), clip.encode_images(images.permute(0, 3, 1, 2)), atol=1e-5)


def test_an_ovsam_is_three_parts_and_the_text_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = Clip(ClipConfig()).eval()
    encoder = ClipTextEncoder(clip.config, clip.model.text, "any")
    splits = {"anchor": "base", "cat": "novel"}
    config = OvSamConfig(sam=SamConfig(image_size=64, width=32, depth=1, heads=2, global_blocks=(), prompt_width=32))
    save_checkpoint(OvSam(config).eval(), encoder, tmp_path / "ovsam", splits=splits, run={})
    out = tmp_path / "out"
    differences = export.export(Run(model=str(tmp_path / "ovsam"), out=str(out)))
    parts = ("ovsam_encoder", "ovsam_decoder", "ovsam_namer", "text_tower")
    assert list(differences) == [f"{part}.onnx" for part in parts]
    names = np.load(out / "names.npz")
    assert names["names"].tolist() == ["anchor", "cat"]
    assert names["clip_weight"].tolist() == pytest.approx([0.1, 0.9])
