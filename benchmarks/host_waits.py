"""How often a training step makes the host wait for a GPU, measured on a pretended one (`tests/pretend_device.py`).

make bench-host_waits

Each wait empties the GPU's queue, so that it idles until Python has sent it more work. A step is that of the workflows:
forward and backward pass, update and metrics, which are read every `log_every` steps. Models are tiny, batches have two
images with boxes and, for CoDet, two groups of two captioned images.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from unittest import mock

import ray.train
import torch
from measure import REPOSITORY, write_figures
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.batches import ConceptBatch, DetectionBatch, StoredRegions
from ovd_models.clip.model import Clip, ClipConfig
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskModelConfig
from ovd_models.ovsam.training import Clip2SamConfig, Clip2SamTraining, FeatureBatch, Sam2ClipTraining
from ovd_models.sam.model import SamConfig
from ovd_models.sam.training import SamTraining, SamTrainingConfig
from ovd_models.segments import MaskBatch
from ovd_models.vild.model import Variant, ViLD, ViLDConfig
from workflows.clip import random_shift
from workflows.common.optimisation import Optimisation
from workflows.common.session import Session
from workflows.common.tracking import MetricLogger
from workflows.common.training import Stage

sys.path.append(str(REPOSITORY / "tests"))
from pretend_device import DEVICE, Wait, pretended
from tiny_centernet2 import TINY_CENTERNET2

SIDE = 64
SETTINGS = Optimisation(learning_rate=1e-3, steps=20, log_every=10, checkpoint_every=1000, workers=0)
RCNN = RCNNConfig(
    backbone_options={"channels": [8, 16, 24, 32], "stem_width": 8},
    pyramid_channels=16,
    head_width=32,
    embed_dim=16,
    min_size=SIDE,
    max_size=2 * SIDE,
    rpn_batch_size=32,
    pre_nms=60,
    post_nms=30,
    rois_per_image=16,
)
C4 = replace(
    RCNN,
    backbone="resnet18",
    backbone_options={},
    strides=(16,),
    anchor_sizes=(8, 16, 32),
    head_width=512,
)
CENTERNET2 = replace(
    TINY_CENTERNET2,
    embed_dim=16,
    min_size=SIDE,
    max_size=2 * SIDE,
    rois_per_image=32,
)
SAM = SamConfig(
    image_size=SIDE, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_width=32
)
OVSAM = OvSamConfig(sam=SAM, pyramid_width=16, label_hidden=32)

Forward = Callable[[nn.Module, torch.device], Mapping[str, Tensor]]
Method = Literal["codet", "centernet2", "vild", "clip", "sam", "ovsam"]


@dataclass(frozen=True)
class Trial:
    """A model and one step's losses of it, as its workflow computes them."""

    model: nn.Module
    losses: Forward


# ------------------------------------------------------------------------------------------------------------- inputs


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def boxes() -> DetectionBatch:
    """Two pictures with a red and a blue square, with masks and stored regions."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 40, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8) for _ in range(2)]
    places = torch.tensor([[6.0, 8, 26, 28], [36, 30, 58, 52]])
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    for row, (x0, y0, x1, y1) in enumerate(places.int().tolist()):
        masks[row, y0:y1, x0:x1] = True
        for image in images:
            image[2 * row, y0:y1, x0:x1] = 230
    stored = torch.cat([places, torch.zeros(1, 4)]).repeat(2, 1, 1)
    regions = StoredRegions(stored, unit(2, 3, 16), torch.tensor([[True, True, False]] * 2))
    return DetectionBatch(tuple(images), (places,) * 2, (torch.tensor([0, 1]),) * 2, (masks,) * 2, regions)


def groups() -> ConceptBatch:
    """Two groups of two captioned pictures."""
    pictures, mentioned = boxes().images, torch.zeros(4, 3, dtype=torch.bool)
    mentioned[:2, 0], mentioned[2:, 2] = True, True
    return ConceptBatch(pictures * 2, torch.tensor([0, 2]), mentioned, ("",) * 4, unit(4, 16, seed=1))


def objects() -> MaskBatch:
    """The pictures of `boxes` with their masks."""
    batch = boxes()
    assert batch.masks is not None
    return MaskBatch(batch.images, batch.masks, batch.labels)


# ------------------------------------------------------------------------------------------------------------- trials


def vild_trial(variant: Variant = "ensemble", *, masks: bool = True) -> Trial:
    """ViLD of any variant."""
    names = ("red", "blue") if variant == "supervised" else ()
    model = ViLD(ViLDConfig(detector=replace(RCNN, masks=masks), variant=variant, supervised_names=names))
    text_KD, trained_K = unit(3, 16), torch.tensor([True, True, False])
    return Trial(model, lambda module, device: module(boxes().to(device), text_KD.to(device), trained_K.to(device)))


def codet_trial(config: CoDetConfig) -> Trial:
    """CoDet's joint step: images with boxes and groups of captioned images."""
    base_KD, concepts_CD = unit(2, 16), unit(3, 16, seed=1)

    def losses(module: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = module(
            boxes().to(device), groups().to(device), base_KD.to(device), concepts_CD.to(device)
        )
        return found

    return Trial(CoDet(config), losses)


def learned(config: CoDetConfig) -> CoDetConfig:
    """With the released aggregation."""
    return replace(config, aggregation="learned", guidance="dimensions", group_size=2)


FPN = CoDetConfig(detector=RCNN, num_proposals=6)
CASCADE = learned(CoDetConfig(architecture="centernet2", centernet2=CENTERNET2, num_proposals=6, sampled_concepts=2))


def clip_trial(chunks: int = 2) -> Trial:
    """CLIP with its contrastive loss over two pairs."""
    clip = Clip(ClipConfig(), chunks)
    contrast = ClipLoss(local_loss=True, gather_with_grad=True)

    def losses(module: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
        images = random_shift(torch.stack(boxes().images).to(device), 2)
        features = module(images, clip.tokenize(["a red square", "a blue square"]).to(device))
        clip.clamp_scale()
        return {"contrastive": contrast(*(value.float() for value in features))}

    return Trial(clip, losses)


def adapter_trial() -> Trial:
    """OV-SAM's adapter, with stored embeddings of the SAM."""
    features = unit(2, 32, 8, 8)
    return Trial(
        Sam2ClipTraining(OvSam(OVSAM)),
        lambda module, device: module(FeatureBatch(boxes().images, features).to(device)),
    )


def ovsam_trial(config: OvSamConfig = OVSAM) -> Trial:
    """OV-SAM's mask decoder and label branch."""
    return Trial(
        Clip2SamTraining(OvSam(config), Clip2SamConfig(num_points=64)),
        lambda module, device: module(
            objects().to(device), unit(2, 1, 128).to(device), torch.Generator().manual_seed(0)
        ),
    )


def sam_trial() -> Trial:
    """SAM with simulated clicks."""
    return Trial(
        SamTraining(SAM, SamTrainingConfig(clicks=1, repeats=1)),
        lambda module, device: module(objects().to(device), torch.Generator().manual_seed(0)),
    )


def text_trial() -> Trial:
    """SAM prompted by CLIP's embeddings."""
    return Trial(
        TextToMask(TextToMaskModelConfig(sam=SAM)),
        lambda module, device: module(objects().to(device), torch.Generator().manual_seed(0)),
    )


TRIALS: dict[Method, Callable[[], Trial]] = {
    "codet": lambda: codet_trial(FPN),
    "centernet2": lambda: codet_trial(CASCADE),
    "vild": vild_trial,
    "clip": clip_trial,
    "sam": sam_trial,
    "ovsam": ovsam_trial,
}


# -------------------------------------------------------------------------------------------------------- measurement


class Alone:
    """What Ray Train tells the only worker."""

    def get_world_size(self) -> int:
        """Workers."""
        return 1

    def get_world_rank(self) -> int:
        """Of this worker."""
        return 0


def train(trial: Trial, steps: int, device: torch.device = DEVICE, settings: Optimisation = SETTINGS) -> Session:
    """Train a trial for some steps, without checkpoints, as the workflows do."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ray.train, "get_context", Alone):
        stage = Stage(job="waits", name="waits", settings=settings, folder=folder)
        session = Session(trial.model, stage, device, MetricLogger("", ""))
        for _ in range(steps):
            with session.autocast():
                losses = trial.losses(session.model, device)
            session.update(losses)
            session.end_step(losses, 2)
        return session


def waits_of_steps(trial: Trial, steps: int = SETTINGS.log_every) -> list[Wait]:
    """The host waits of some steps of a trial on the pretended device."""
    with pretended() as waits:
        train(trial, steps)
        return waits


def measure_waits() -> dict[str, float]:
    """`host_waits_<method>` of one step; prints the lines that cause them."""
    figures = {}
    for method, build in TRIALS.items():
        waits = waits_of_steps(build())
        figures[f"host_waits_{method}"] = len(waits) / SETTINGS.log_every
        for wait, count in Counter(waits).most_common():
            print(f"{method}: {count / SETTINGS.log_every:4.1f} {wait.operator} {wait.line}")
    return figures


def main() -> None:
    """Write the figures to `runs/bench/host_waits.json`."""
    figures = measure_waits()
    write_figures("host_waits", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
