import dataclasses
import math
from typing import Any

import pytest
import torch
from ovsam_release import published_form
from pretend_device import DEVICE
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from ovd_models.clip.model import Clip, ClipConfig
from ovd_models.errors import InputError
from ovd_models.importers.ovsam import account_ovsam_tensors, load_ovsam
from ovd_models.ovsam import crops as ovsam_crops
from ovd_models.ovsam.adapter import Sam2Clip, feature_distillation_loss, valid_positions
from ovd_models.ovsam.baselines import BaselineConfig, SamClip
from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig, build_tower, resize_places
from ovd_models.ovsam.crops import crop_masks
from ovd_models.ovsam.head import (
    ROI_SIDE,
    RegionNamer,
    fuse_scores,
    label_loss,
    mask_losses,
    name_logits,
    read_points,
    region_levels,
    synonym_rows,
    uncertain_points,
)
from ovd_models.ovsam.metrics import PointingMetrics, centre_points, next_click
from ovd_models.ovsam.model import OvSam, OvSamConfig, enlarge
from ovd_models.ovsam.training import Clip2SamConfig, Clip2SamTraining, FeatureBatch, Sam2ClipTraining
from ovd_models.sam import model as sam
from ovd_models.sam.model import EncodedImage, EverythingConfig, SamConfig, SamModel
from ovd_models.segments import OFF, ON, MaskBatch, Prompts, boxes_of
from ovd_models.vocabulary import Vocabulary

TINY_SAM = SamConfig(
    image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_width=32
)
TINY = OvSamConfig(sam=TINY_SAM, pyramid_width=16, label_hidden=32)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


NAMES = Vocabulary(("anchor", "cat", "cup"), unit(3, 128), torch.tensor([True, True, False]))


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def learnt_by(training: torch.nn.Module) -> list[str]:
    return [name for name, weight in training.named_parameters() if weight.requires_grad]


@pytest.fixture(scope="module")
def teacher() -> SamModel:
    torch.manual_seed(0)
    return SamModel(TINY_SAM).eval()


@pytest.fixture(scope="module")
def model(teacher: SamModel) -> OvSam:
    torch.manual_seed(0)
    model = OvSam(TINY).eval()
    model.load_teachers(teacher, build_tower(TINY.tower, 64))
    return model


def test_what_is_pointed_at_gets_a_mask_and_a_name(model: OvSam) -> None:
    found = model.segment(picture(), Prompts.create(boxes=[[4, 4, 30, 40], [10, 0, 64, 48]]), NAMES)
    assert found.masks.shape == (2, 48, 64)
    assert all(0 < score < 1 for score in found.scores.tolist())
    assert {entry["label"] for entry in found.to_list()} <= set(NAMES.names)


def test_masks_of_large_pictures_are_made_in_parts(model: OvSam, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Prompts.create(boxes=[[4, 4, 30, 40], [10, 0, 64, 48], [1, 2, 9, 9]])
    cut_out = OvSam(dataclasses.replace(TINY, clip_view="cut_out")).eval()
    cut_out.load_state_dict(model.state_dict())
    whole = cut_out.segment(picture(), asked, NAMES)
    for module in (sam, ovsam_crops):
        monkeypatch.setattr(module, "PIXELS_AT_A_TIME", 1)
    parts = cut_out.segment(picture(), asked, NAMES)
    assert torch.equal(parts.masks, whole.masks)
    assert torch.allclose(parts.scores, whole.scores, atol=1e-5)


@pytest.mark.parametrize("view", ["features", "cut_out"])
def test_many_prompts_are_answered_in_parts(model: OvSam, view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = OvSam(dataclasses.replace(TINY, clip_view=view)).eval()
    cut.load_state_dict(model.state_dict())
    encoded, rows = cut.encode(picture()), count_rows(monkeypatch, cut, "decode", "head_logits", "clip_logits")
    corner = torch.rand(70, 2, generator=torch.Generator().manual_seed(0)) * 30
    prompts = Prompts(boxes=torch.cat([corner, corner + 15], 1))
    found = cut.segment(encoded, prompts, NAMES)
    assert rows == {"decode": [64, 6], "head_logits": [64, 6], "clip_logits": [64, 6]}
    last = cut.segment(encoded, prompts.take(slice(60, 70)), NAMES)
    assert torch.allclose(found.low_res[60:], last.low_res, atol=1e-5)
    assert torch.allclose(found.scores[60:], last.scores, atol=1e-5)


def count_rows(monkeypatch: pytest.MonkeyPatch, model: OvSam, *methods: str) -> dict[str, list[int]]:
    """The rows that each call of methods answers, by method, from now on."""
    rows: dict[str, list[int]] = {name: [] for name in methods}

    def counted(name: str) -> Any:
        method = getattr(model, name)

        def call(*values: Any) -> Any:
            answer = method(*values)
            rows[name].append(len(answer[0] if isinstance(answer, tuple) else answer))
            return answer

        return call

    for name in methods:
        monkeypatch.setattr(model, name, counted(name))
    return rows


def test_crops_of_many_masks_are_embedded_in_parts(model: OvSam, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, embed = [], model.clip.embed
    monkeypatch.setattr(model.clip, "embed", lambda crops: (rows.append(len(crops)), embed(crops))[1])
    masks = torch.zeros(70, 48, 64, dtype=torch.bool)
    masks[:, 10:20, 10:20] = True
    assert model.clip.embed_crops(picture(), masks, 1.0, "mean").shape == (70, 128)
    assert rows == [64, 6]


def test_results_under_autocast_are_float32(model: OvSam) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = model.segment(picture(), Prompts.create(points=[[20, 10]]), NAMES)
    assert {found.ious.dtype, found.low_res.dtype, found.scores.dtype} == {torch.float32}


def test_without_a_vocabulary_masks_have_no_names(model: OvSam) -> None:
    found = model.segment(picture(), Prompts.create(points=[[20, 20]]))
    assert found.to_list()[0]["label"] is None
    assert found.labels.tolist() == [-1]


def test_any_names_will_do_on_an_encoded_image(model: OvSam) -> None:
    encoded = model.encode(picture())
    prompts = Prompts.create(points=[[20, 20]])
    one = model.segment(encoded, prompts, Vocabulary(("a", "b"), unit(2, 128, seed=3)))
    two = model.segment(encoded, prompts, NAMES)
    assert torch.equal(one.low_res, two.low_res)
    assert (one.names, two.names) == (("a", "b"), NAMES.names)


def test_a_mask_does_not_depend_on_the_other_prompts(model: OvSam) -> None:
    encoded, clicks, labels = model.encode(picture()), [[[20, 10]], [[30, 30], [5, 5]], [[9, 40]]], [[1], [1, 0], [1]]
    found = model.segment(encoded, Prompts.create(points=clicks, point_labels=labels), NAMES)
    for row, (points, label) in enumerate(zip(clicks, labels, strict=True)):
        alone = model.segment(encoded, Prompts.create(points=[points], point_labels=[label]), NAMES)
        assert torch.allclose(found.low_res[row], alone.low_res[0], atol=1e-5)
        assert torch.allclose(found.scores[row], alone.scores[0], atol=1e-5)


def test_no_prompt_is_told(model: OvSam) -> None:
    with pytest.raises(InputError, match="prompts: empty"):
        model.segment(picture(), Prompts(), NAMES)
    with pytest.raises(InputError, match="lies outside"):
        model.segment(picture(), Prompts.create(points=[[99, 99]]), NAMES)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 20_000)])
def test_images_of_any_shape(model: OvSam, height: int, width: int) -> None:
    image = torch.full((3, height, width), 99, dtype=torch.uint8)
    found = model.segment(image, Prompts.create(points=[[0, 0]]), NAMES)
    assert found.masks.shape == (1, height, width)
    assert math.isfinite(float(found.scores[0]))


def test_the_teachers_single_mask_decoder_is_taken_over(teacher: SamModel, model: OvSam) -> None:
    embedding = torch.randn(1, 32, 8, 8)
    sparse, dense = teacher.sam.prompt_encoder(None, torch.tensor([[4.0, 4, 40, 40]]), None)
    low, ious = model.decode(embedding, sparse, dense)
    expected, qualities = teacher.sam.mask_decoder(
        embedding, teacher.sam.prompt_encoder.get_dense_pe(), sparse, dense, False
    )
    # the other mask tokens are gone, and with them their part in the tokens' attention
    assert low.shape == expected[:, 0].shape
    assert ious.shape == qualities[:, 0].shape
    wanted = teacher.sam.mask_decoder.state_dict()
    for name, value in model.mask_decoder.state_dict().items():
        assert torch.equal(value, wanted[name][: len(value)]), name


def test_everything_names_every_mask(model: OvSam) -> None:
    settings = EverythingConfig(points_per_side=4, min_iou=-9, min_stability=0.0)
    found = model.everything(picture(), NAMES, settings)
    assert len(found) >= 1
    assert (found.labels >= 0).all()
    assert found.ious.tolist() == sorted(found.ious.tolist(), reverse=True)
    height, width = picture().shape[1:]
    places = [[width * (0.5 + x) / 4, height * (0.5 + y) / 4] for y in range(4) for x in range(4)]
    every = model.segment(picture(), Prompts.create(points=places), NAMES)
    filled = torch.nonzero(every.masks.flatten(1).any(1)).flatten()
    best = filled[nms(every.boxes[filled], every.ious[filled], settings.nms_iou)]
    assert torch.equal(found.masks, every.masks[best])
    assert torch.equal(found.labels, every.labels[best])
    nothing = model.everything(picture(), NAMES, dataclasses.replace(settings, min_iou=99.0))
    assert len(nothing) == 0
    assert nothing.reason.startswith("0 of 16 clicks give a mask with a predicted IoU of 99 or more (the best has ")
    assert not found.reason
    silent = OvSam(dataclasses.replace(TINY, iou_head=False)).eval()
    with pytest.raises(InputError, match="no IoU head"):
        silent.everything(picture(), NAMES)


# --------------------------------------------------------------------------------------------------------- pyramid

RESNET = TowerConfig(embed_dim=16, vision={"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16})
VIT = TowerConfig(embed_dim=16, vision={"image_size": 64, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8})
CONVNEXT = TowerConfig(
    embed_dim=16,
    vision={"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "mlp", "image_size": 64},
)


def test_a_checkpoints_config_reaches_no_hub() -> None:
    for name in ("hf-hub:somebody/net", "local-dir:/tmp"):
        vision = {**CONVNEXT.vision, "timm_model_name": name, "timm_model_pretrained": True}
        with pytest.raises(InputError, match="an address, expected a name that timm knows"):
            build_tower(TowerConfig(embed_dim=16, vision=vision), 64)
        with pytest.raises(InputError, match="an address, expected a name that timm knows"):
            Clip(ClipConfig(vision=vision))


@pytest.mark.parametrize(
    ("tower", "strides"),
    [
        (TowerConfig(), (2, 4, 8, 16)),
        (RESNET, (4, 8, 16, 32)),
        (CONVNEXT, (4, 8, 16, 32)),
        (VIT, (8, 8, 8, 8)),
    ],
)
def test_every_kind_of_tower_has_four_levels_and_a_head(tower: TowerConfig, strides: tuple[int, ...]) -> None:
    clip = ClipPyramid(build_tower(tower, 64), tower)
    levels = clip(torch.randn(2, 3, 64, 64))
    assert clip.strides == strides
    assert [tuple(level.shape) for level in levels] == [
        (2, channels, 64 // stride, 64 // stride) for channels, stride in zip(clip.channels, strides, strict=True)
    ]
    rois = torch.tensor([[0.0, 4, 4, 40, 40], [1, 0, 0, 64, 64]])
    for embedding in (
        clip.region_embeddings(levels[-1], rois),
        clip.mask_embeddings(levels[-1], torch.ones(2, *levels[-1].shape[2:])),
    ):
        assert embedding.shape == (2, tower.embed_dim)
        assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)
    assert clip.region_embeddings(levels[-1], rois[:0]).shape == (0, tower.embed_dim)
    assert not any(weight.requires_grad for weight in clip.parameters())
    assert not clip.train().training


@pytest.mark.parametrize("tower", [TowerConfig(), RESNET])
def test_a_whole_picture_as_a_region_is_clips_own_embedding(tower: TowerConfig) -> None:
    clip = ClipPyramid(build_tower(tower, 64), tower)
    images = torch.randn(2, 3, 64, 64)
    own = F.normalize(clip.tower(images), dim=-1)
    whole = torch.tensor([[0.0, 0, 0, 64, 64], [1, 0, 0, 64, 64]])
    # RoIAlign of the whole map on its own grid, one sample in the middle of each cell, is the map
    assert torch.allclose(clip.region_embeddings(clip(images)[-1], whole), own, atol=1e-4)


def test_a_transformer_is_taken_over_at_another_size() -> None:
    source, clip = build_tower(VIT, 64), ClipPyramid(build_tower(VIT, 128), VIT)
    clip.load_tower(source.state_dict())
    assert torch.equal(clip.tower.class_embedding, source.class_embedding)
    pictures = torch.randn(2, 3, 64, 64)  # of its own size, as it was trained on
    assert torch.allclose(clip.embed(pictures), F.normalize(source.eval()(pictures), dim=-1), atol=1e-6)
    again = ClipPyramid(build_tower(VIT, 128), VIT)
    again.load_state_dict(clip.state_dict())
    assert torch.equal(again.embed(pictures), clip.embed(pictures))
    codes = torch.cat([torch.zeros(1, 2), torch.arange(4.0)[:, None].expand(-1, 2)])  # 0 1 / 2 3
    resized = resize_places(codes, 4)
    assert resized.shape == (17, 2)
    assert resized[1:, 0].mean().item() == pytest.approx(1.5)
    assert resized[1, 0] < resized[4, 0] < resized[16, 0]
    same = ClipPyramid(build_tower(VIT, 64), VIT)
    same.load_tower(source.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(same(images)[-1], ClipPyramid(source, VIT)(images)[-1])


def test_a_transformer_of_fewer_blocks_than_levels_gives_its_last_maps_twice() -> None:
    shallow = TowerConfig(embed_dim=16, vision={**VIT.vision, "layers": 3})
    levels = ClipPyramid(build_tower(shallow, 64), shallow)(torch.randn(1, 3, 64, 64))
    assert torch.equal(levels[2], levels[3])
    assert not torch.equal(levels[0], levels[1]) and not torch.equal(levels[1], levels[2])


def test_whole_pictures_are_embedded_by_every_kind_of_tower() -> None:
    for tower in (TowerConfig(), RESNET, CONVNEXT, VIT):
        clip = ClipPyramid(build_tower(tower, 128), tower)  # a transformer's place codes are then those of 128 px
        embedding = clip.embed(torch.randn(2, 3, 64, 64))
        assert embedding.shape == (2, tower.embed_dim)
        assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_tower_without_levels_is_told() -> None:
    with pytest.raises(InputError, match="has no levels"):
        ClipPyramid(torch.nn.Linear(2, 2), TowerConfig())


# --------------------------------------------------------------------------------------------------------- adapter


def test_padding_has_no_part_in_the_distillation() -> None:
    student, teacher = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    teacher[0, :, 0, 0] = torch.tensor([1.0, 3.0])  # (1 + 9) / 2 channels = 5, over the 2 x 3 valid positions
    teacher[0, :, 3, 3] = 100.0  # in the padding
    valid = valid_positions([(15, 20)], 8, 4)
    assert valid.tolist() == [[[True, True, True, False], [True, True, True, False], [False] * 4, [False] * 4]]
    assert feature_distillation_loss(student, teacher, valid).item() == pytest.approx(5 / 6)
    assert feature_distillation_loss(student, teacher.half(), valid & False).item() == 0


def test_levels_that_do_not_fit_are_told() -> None:
    with pytest.raises(InputError, match="stride 6: does not fit"):
        Sam2Clip((8,), (6,), TINY_SAM, 1)


def test_the_adapter_learns_a_teachers_embedding(teacher: SamModel) -> None:
    torch.manual_seed(0)
    model = OvSam(TINY)
    training = Sam2ClipTraining(model)
    images = (picture(), picture(64, 40, seed=1))
    features = torch.cat([teacher.encode(image).embedding for image in images]).half()
    optimiser = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=3e-3)
    first = last = 0.0
    for step in range(40):
        loss = training(FeatureBatch(images, features))["distillation"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    assert last < 0.3 * first
    assert all(name.startswith("model.adapter.") for name in learnt_by(training))


# ------------------------------------------------------------------------------------------------------------ head


def test_levels_by_size() -> None:
    sides = torch.tensor([10.0, 56, 111, 112, 224, 448, 5000])
    rois = F.pad(torch.stack([sides, sides], dim=1), (3, 0))
    assert region_levels(rois, 4, 4).tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert region_levels(torch.zeros(1, 5), 4, 4).tolist() == [0]


def test_a_name_is_as_near_as_its_nearest_synonym() -> None:
    text = torch.tensor([[[1.0, 0], [0, 1]], [[-1, 0], [-1, 0]]])
    logits = name_logits(torch.tensor([[0.0, 5.0]]), text, math.log(10))
    assert logits.tolist() == [[pytest.approx(10), pytest.approx(0), 0]]
    assert name_logits(torch.zeros(0, 2), text).shape == (0, 3)


def test_every_synonym_of_a_name_is_asked() -> None:
    rows, owners = unit(5, 8), torch.tensor([0, 0, 0, 1, 2])
    text = synonym_rows(Vocabulary(("cat", "cup", "die"), rows, None, owners))
    assert torch.equal(text[0], rows[:3])
    assert torch.equal(text[1:], rows[3:, None].expand(-1, 3, -1))
    assert name_logits(rows, text)[:, :3].argmax(1).tolist() == owners.tolist()
    assert torch.equal(synonym_rows(NAMES)[:, 0], NAMES.embeddings)


def test_fusion_by_hand() -> None:
    head, clip = torch.tensor([[0.0, 0.0, 0.0]]), torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    third = math.log(1 / 3)
    expected = [
        0.9 * third + 0.1 * math.log(0.5),
        0.1 * third + 0.9 * math.log(0.25),
        0.9 * third + 0.1 * math.log(0.25),
    ]
    assert fuse_scores(head, clip, torch.tensor([True, False]))[0].tolist() == pytest.approx(expected)
    nobody_knows = fuse_scores(head, clip, None)[0].tolist()
    assert nobody_knows[0] == pytest.approx(0.1 * third + 0.9 * math.log(0.5))
    unseen = fuse_scores(head, clip, None, torch.tensor([False]))[0].tolist()
    assert unseen == pytest.approx([third] * 3)
    biased = fuse_scores(head, clip, torch.tensor([True, False]), novel_bias=2.0)[0].tolist()
    assert biased == pytest.approx([expected[0], expected[1] + 2, expected[2]])
    assert fuse_scores(head, clip, None, novel_bias=2.0)[0].tolist() == nobody_knows
    half = fuse_scores(
        torch.tensor([[6e4, 0.0, 0]]).half(), torch.tensor([[0, 6e4, 0.0]]).half(), torch.tensor([True, False])
    )
    assert bool(torch.isfinite(half).all())


def test_losses_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.1, 0.1, 0.8]]))
    # -log 1/2 of the first, -log 1/4 of the second, nothing of the third, over three regions
    expected = (math.log(2) + math.log(4)) / 3
    assert label_loss(logits, torch.tensor([0, 1, -1])).item() == pytest.approx(expected)
    assert label_loss(logits[:0], torch.zeros(0, dtype=torch.int64)).item() == 0
    assert label_loss(logits, torch.full((3,), -1)).item() == 0
    entropy, dice = mask_losses(torch.zeros(1, 4), torch.tensor([[1.0, 1, 0, 0]]))
    assert entropy.item() == pytest.approx(math.log(2))
    assert dice.item() == pytest.approx(1 - (2 + 1) / (2 + 2 + 1))
    assert [loss.item() for loss in mask_losses(torch.zeros(0, 4), torch.zeros(0, 4))] == [0, 0]


def test_points_gather_where_the_mask_is_undecided() -> None:
    ramp = torch.linspace(-5, 5, 32).expand(1, 32, 32)  # undecided in the middle column
    points = uncertain_points(ramp, 400, torch.Generator().manual_seed(0))
    assert points.shape == (1, 400, 2)
    near = ((points[0, :, 0] - 0.5).abs() < 0.13).float().mean().item()
    assert near == pytest.approx(0.75 + 0.25 * 0.26, abs=0.06)
    values = read_points(ramp, torch.tensor([[[0.5, 0.5], [1 / 64, 0.3]]]))
    assert values[0].tolist() == pytest.approx([0, -5], abs=1e-5)
    assert uncertain_points(ramp[:0], 8, None).shape == (0, 8, 2)


def objects() -> MaskBatch:
    images, masks = [], []
    for index in range(2):
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[0, 8 + 8 * index : 40, 16:48] = True
        masks.append(mask)
        colours = torch.tensor([200, 60, 60] if index else [60, 60, 200])[:, None, None]
        images.append((mask * colours + 30).to(torch.uint8))
    return MaskBatch(tuple(images), tuple(masks), (torch.tensor([0]), torch.tensor([1])))


def test_every_weight_of_the_stage_takes_part(teacher: SamModel) -> None:
    training = Clip2SamTraining(OvSam(dataclasses.replace(TINY, label_token=True)), Clip2SamConfig(num_points=64))
    losses = training(objects(), synonym_rows(NAMES), torch.Generator().manual_seed(0))
    assert set(losses) == {"classes", "mask", "dice", "iou"}
    sum(losses.values()).backward()
    for name, weight in training.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
    learnt = {name.split(".")[1] for name in learnt_by(training)}
    assert learnt == {"mask_decoder", "namer", "label_token"}


def test_images_without_objects_teach_nothing() -> None:
    batch = objects()
    batch = MaskBatch(batch.images, tuple(m[:0] for m in batch.masks), tuple(t[:0] for t in batch.labels))
    training = Clip2SamTraining(OvSam(TINY), Clip2SamConfig())
    losses = training(batch, synonym_rows(NAMES))
    assert {name: float(value) for name, value in losses.items()} == dict.fromkeys(
        ("classes", "mask", "dice", "iou"), 0
    )
    sum(losses.values()).backward()


def test_two_images_are_overfitted(teacher: SamModel) -> None:
    torch.manual_seed(0)
    model = OvSam(TINY)
    training, generator = Clip2SamTraining(model, Clip2SamConfig(num_points=256)), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=3e-3)
    batch = objects()
    for _ in range(60):
        optimiser.zero_grad()
        sum(training(batch, synonym_rows(NAMES), generator).values()).backward()
        optimiser.step()
    model.eval()
    for image, masks, label in zip(batch.images, batch.masks, batch.labels, strict=True):
        for prompts in (Prompts(boxes=boxes_of(masks)), Prompts.create(points=[[32, 28]])):
            found = model.segment(image, prompts, NAMES)
            rois = F.pad(model.rois_of(found.low_res, prompts.boxes), (1, 0))
            head = model.head_logits(model.encode(image).pyramid, rois, synonym_rows(NAMES))
            assert head.argmax(1).tolist() == label.tolist()
            union = (found.masks | masks).sum()
            assert (found.masks & masks).sum() / union > 0.7


# ------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize(
    "config",
    [
        BaselineConfig(),
        BaselineConfig(background="mean", margin=1.5),
        BaselineConfig(background="black"),
        BaselineConfig(crop="mask_features"),
        BaselineConfig(crop="roi_features", margin=1.5),
    ],
)
def test_baselines_name_sams_masks(teacher: SamModel, config: BaselineConfig) -> None:
    clip = ClipPyramid(build_tower(TowerConfig(), 64), TowerConfig())
    baseline = SamClip(teacher, clip, config).eval()
    prompts = Prompts.create(boxes=[[4, 4, 30, 40], [10, 0, 64, 48]])
    found = baseline.segment(picture(), prompts, NAMES)
    assert torch.equal(found.masks, teacher.segment(picture(), prompts).masks)
    assert (found.labels >= 0).all()
    assert baseline.segment(picture(), prompts).labels.tolist() == [-1, -1]


def test_crops_are_squares_around_the_mask() -> None:
    image = torch.zeros(3, 80, 80, dtype=torch.uint8)
    image[0], image[:, 20:40, 30:70] = 50, 9  # a wide object on red ground
    masks = torch.zeros(2, 80, 80, dtype=torch.bool)
    masks[0, 20:40, 30:70] = True  # and an empty mask, which has the whole image
    colours, black = image - 7.0, torch.full((3, 1, 1), -7.0)
    for background, ground in (("keep", 43.0), ("black", -7.0), ("mean", 0.0)):
        crops = crop_masks(colours, masks, black, 1.0, background, 64)
        assert crops.shape == (2, 3, 64, 64)  # a square of 40 px: the object's 20 rows fill its middle half
        assert crops[0, 0, 32, 32].item() == pytest.approx(2)
        assert crops[0, 0, 5, 32].item() == pytest.approx(ground)
        assert crops[1, 0, 5, 32].item() == pytest.approx(43)
    wide = crop_masks(colours, masks[:1], black, 4.0, "keep", 64)[0]
    assert wide[0, 0, 0].item() == 0  # beyond the image's edge is CLIP's mean colour
    assert crop_masks(colours, masks[:0], black, 1.0, "mean", 64).shape == (0, 3, 64, 64)


def test_the_order_of_a_regions_parts_counts_for_the_mlp_alone() -> None:
    torch.manual_seed(0)
    pooled = torch.rand(2, 8, ROI_SIDE, ROI_SIDE)
    for hidden in (0, 16):
        namer = RegionNamer((4, 8), (4, 8), 8, 24, hidden)
        one, two = namer.embed(pooled), namer.embed(pooled.flip(3))
        assert one.shape == (2, 24)
        assert torch.allclose(one, two, atol=1e-6) == (hidden == 0)
        assert bool((one < 0).any()) == (hidden > 0)


def test_the_next_click_of_masks_on_a_gpu_is_on_the_cpu_as_other_prompts_are() -> None:
    true = torch.zeros(1, 8, 8, dtype=torch.bool)
    true[:, 2:5, 2:5] = True
    points, labels = next_click(torch.zeros_like(true).to(DEVICE), true.to(DEVICE))
    assert points.tolist() == [[3, 3]]
    assert (points.device.type, labels.device.type) == ("cpu", "cpu")


def test_the_next_click_lies_in_the_larger_error() -> None:
    true, found = torch.zeros(3, 8, 8, dtype=torch.bool), torch.zeros(3, 8, 8, dtype=torch.bool)
    true[:, 1:6, 1:6] = True
    found[0, 1:6, 1:3] = True  # misses the right part
    found[1] = True  # spills over everything
    found[2] = true[2]  # perfect
    points, labels = next_click(found, true)
    assert labels.tolist() == [ON, OFF, ON]
    x, y = points[0].long().tolist()
    assert true[0, y, x] and not found[0, y, x]
    x, y = points[1].long().tolist()
    assert not true[1, y, x]
    assert points[2].tolist() == [3, 3]  # the deepest pixel of the object


def test_a_label_branch_may_see_clips_last_level_alone() -> None:
    model = OvSam(dataclasses.replace(TINY, label_levels=1)).eval()
    whole = OvSam(TINY).eval()
    encoded = model.encode(picture())
    assert (len(encoded.pyramid), len(whole.encode(picture()).pyramid)) == (1, 4)
    assert encoded.pyramid[0].shape[-1] == 64 // model.clip.strides[-1]
    found = model.segment(encoded, Prompts.create(boxes=[[4, 4, 30, 40], [0, 0, 64, 48]]), NAMES)
    assert (found.labels >= 0).all()
    with pytest.raises(InputError, match="label_levels: 5, expected 1 to 4"):
        OvSam(dataclasses.replace(TINY, label_levels=5))


def test_cut_outs_show_clip_the_masked_thing_alone(teacher: SamModel) -> None:
    torch.manual_seed(2)
    model = OvSam(dataclasses.replace(TINY, clip_view="cut_out", log_scale=math.log(20.0), alpha=1.0, beta=1.0)).eval()
    model.load_teachers(teacher, build_tower(TINY.tower, 64))
    prompts = Prompts.create(boxes=[[4, 4, 30, 40], [10, 0, 64, 48]])
    found = model.segment(picture(), prompts, NAMES)
    assert found.masks.flatten(1).any(1).all()  # else the head would decide alone
    # With CLIP's part at 1, it alone decides: it is what the baseline with the same masks says.
    options = BaselineConfig(margin=1.5, background="mean")
    baseline = SamClip(teacher, model.clip, options).eval()
    by_clip = baseline.name(picture(), found, NAMES, teacher.encode(picture()))
    assert torch.equal(found.labels, by_clip.labels)
    # Elsewhere than around the thing the picture may change without a difference to CLIP.
    encoded = model.encode(picture())
    changed = torch.where(found.masks[0], picture(), picture(seed=1))
    text, rois = synonym_rows(NAMES), torch.zeros(1, 5)
    one = model.clip_logits(encoded, rois, found.masks[:1], text)
    two = model.clip_logits(dataclasses.replace(encoded, image=changed), rois, found.masks[:1], text)
    assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------ metric, importers


def test_means_are_over_instances() -> None:
    metrics = PointingMetrics()
    metrics.add(torch.tensor([1.0, 0.5, 0.0]), [4, 5, 6], [4, 5, 7], [False, True, True])
    metrics.add(torch.tensor([]), [], [], [])
    summary = metrics.summary()
    assert (summary["iou_all"], summary["iou_base"], summary["iou_novel"]) == (0.5, 1.0, 0.25)
    assert (summary["accuracy_base"], summary["accuracy_novel"]) == (1.0, 0.5)
    sums, counts = metrics.by_image()["iou_novel"]
    assert (sums.tolist(), counts.tolist()) == ([0.5, 0.0], [2.0, 0.0])
    assert math.isnan(PointingMetrics().summary()["iou_novel"])


def test_the_centre_is_deepest_inside() -> None:
    masks = torch.zeros(2, 9, 11, dtype=torch.bool)
    masks[0, 2:7, 3:8] = True
    assert centre_points(masks).tolist() == [[5, 4], [0, 0]]


def test_masks_of_an_extremely_long_image_lose_their_edge() -> None:
    encoded = EncodedImage(torch.zeros(0), (1, 64), (313, 20_000), (20, 20_000))
    assert enlarge(torch.ones(1, 32, 32), encoded, 64).shape == (1, 20, 20_000)


def test_published_files_load_and_unknown_tensors_are_refused(tmp_path: Any) -> None:
    config = dataclasses.replace(TINY, tower=RESNET, label_hidden=0, label_token=True, iou_head=False)
    torch.manual_seed(0)
    source, target = OvSam(config), OvSam(config)
    published = published_form(source)
    path = tmp_path / "ovsam.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": published}, path)
    load_ovsam(target, path)
    wanted = source.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in target.state_dict().items())

    torch.save({**published, "surplus.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="surplus"):
        load_ovsam(target, path)
    assert account_ovsam_tensors(["surplus.weight"]).unaccounted == ("surplus.weight",)
    part = {name: value for name, value in published.items() if not name.startswith("pe.")}
    torch.save(part, path)
    with pytest.raises(InputError, match=r"Missing .*prompt_encoder"):
        load_ovsam(target, path)
    sam = SamModel(TINY_SAM).sam
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    load_ovsam(target, tmp_path / "sam.pth", path)  # the rest comes from SAM's own file
    pe = target.prompt_encoder.state_dict()
    assert all(torch.equal(value, sam.prompt_encoder.state_dict()[name]) for name, value in pe.items())
