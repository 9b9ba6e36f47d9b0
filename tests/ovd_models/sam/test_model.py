import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import PromptEncoder
from torch import Tensor
from torch.nn import functional as F

from ovd_models.errors import InputError
from ovd_models.sam import model as sam_model
from ovd_models.sam.model import (
    VIT_B,
    EverythingConfig,
    SamConfig,
    SamModel,
    build_prompt_encoder,
    build_sam,
    fit_image,
    fit_on_device,
    load_sam,
    run_decoder,
)
from ovd_models.sam.training import (
    SamTraining,
    SamTrainingConfig,
    best_mask_weights,
    corrective_clicks,
    dice_loss,
    focal_loss,
    jitter_boxes,
    mask_ious,
    resize_masks_to_square,
    sample_objects,
)
from ovd_models.segments import OFF, ON, PADDING, MaskBatch, Prompts, boxes_of

TINY = SamConfig(image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_width=32)


@pytest.fixture(scope="module")
def model() -> SamModel:
    torch.manual_seed(0)
    return SamModel(TINY).eval()


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_a_box_gives_one_mask_of_the_original_size(model: SamModel) -> None:
    found = model.segment(picture(), Prompts.create(boxes=[[4, 4, 30, 40], [10, 0, 64, 48]]))
    assert (found.masks.shape, found.masks.dtype, len(found)) == ((2, 48, 64), torch.bool, 2)
    assert found.labels.tolist() == [-1, -1]
    assert found.to_list()[0]["mask"]["size"] == [48, 64]
    assert found.draw(image=Image.new("RGB", (64, 48))).width >= 64


# --------------------------------------------------------------------------------------- the package, number by number

KINDS = {
    "one click": {"points": [[20, 10]]},
    "two clicks": {"points": [[[20, 10], [40, 30]]], "point_labels": [[1, 0]]},
    "box": {"boxes": [[5, 6, 50, 40]]},
    "box and click": {"boxes": [[5, 6, 50, 40]], "points": [[20, 10]]},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_masks_equal_the_packages_exactly(model: SamModel, kind: str) -> None:
    prompts = Prompts.create(**KINDS[kind])
    image = picture(40, 57)  # not the model's size, so that resizing takes part
    found = model.segment(image, prompts)
    predictor = SamPredictor(model.sam)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    masks, ious, low = predictor.predict(
        None if prompts.points is None else prompts.points[0].numpy(),
        None if prompts.point_labels is None else prompts.point_labels[0].numpy(),
        None if prompts.boxes is None else prompts.boxes[0].numpy(),
        multimask_output=kind == "one click",
    )
    best = int(ious.argmax())
    assert np.array_equal(found.masks[0].numpy(), masks[best])
    assert float(found.ious[0]) == float(ious[best])
    assert np.array_equal(found.low_res[0].numpy(), low[best])


def test_a_refined_mask_equals_the_packages_exactly(model: SamModel) -> None:
    image = picture()
    first = model.segment(image, Prompts.create(points=[[20, 10]]))
    refined = model.segment(image, Prompts.create(points=[[20, 10]], masks=first.low_res))
    predictor = SamPredictor(model.sam)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    masks, _, _ = predictor.predict(
        np.array([[20, 10]]), np.array([1]), mask_input=first.low_res.numpy(), multimask_output=False
    )
    assert np.array_equal(refined.masks[0].numpy(), masks[0])


def test_results_under_autocast_are_float32(model: SamModel) -> None:
    settings = EverythingConfig(points_per_side=4, min_iou=-9, min_stability=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        clicked = model.segment(picture(), Prompts.create(points=[[20, 10]]))
        for found in (clicked, model.everything(picture(), settings)):
            assert len(found) > 0
            assert (found.ious.dtype, found.low_res.dtype) == (torch.float32, torch.float32)


def test_prompts_together_answer_as_one_by_one(model: SamModel) -> None:
    encoded = model.encode(picture())
    boxes = [[4, 4, 30, 40], [10, 2, 60, 44], [0, 0, 64, 48]]
    together = model.segment(encoded, Prompts.create(boxes=boxes))
    alone = [model.segment(encoded, Prompts.create(boxes=[box])) for box in boxes]
    assert torch.allclose(together.low_res, torch.cat([entry.low_res for entry in alone]), atol=1e-5)


@pytest.mark.parametrize(("clicks", "maps"), [(True, 3), (False, 1)])
def test_masks_of_many_prompts_are_made_in_parts(
    model: SamModel, clicks: bool, maps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, corner = model.encode(picture()), torch.arange(7)[:, None] * 4.0 + torch.tensor([3.0, 2])
    prompts = Prompts.create(**{"points": corner} if clicks else {"boxes": torch.cat([corner, corner + 9], 1)})
    whole, rows, postprocess = model.segment(encoded, prompts), [], model.sam.postprocess_masks
    monkeypatch.setattr(
        model.sam, "postprocess_masks", lambda low, *sizes: (rows.append(len(low)), postprocess(low, *sizes))[1]
    )
    monkeypatch.setattr(sam_model, "PIXELS_AT_A_TIME", 3 * maps * 64 * 64 + 1)
    parts = model.segment(encoded, prompts)
    assert rows == [3, 3, 1]
    assert torch.equal(parts.masks, whole.masks)
    assert torch.allclose(parts.low_res, whole.low_res, atol=1e-5)
    assert sam_model.prompts_at_a_time((4000, 3000), 1024) == 1
    rows.clear()
    settings = EverythingConfig(points_per_side=4, min_iou=-9.0, min_stability=0.0)
    model.everything(picture(), settings)
    assert max(rows) == (3 if clicks else 1)


def test_a_mask_does_not_depend_on_the_other_prompts(model: SamModel) -> None:
    # A single click has three masks to choose from, two clicks have one; the first prompt is padded to two points.
    encoded, clicks, labels = model.encode(picture()), [[[20, 10]], [[30, 30], [5, 5]], [[9, 40]]], [[1], [1, 0], [1]]
    mixed = Prompts.create(points=clicks, point_labels=labels)
    assert mixed.point_labels is not None and mixed.point_labels.tolist() == [[1, -1], [1, 0], [1, -1]]
    found = model.segment(encoded, mixed)
    alone = [
        model.segment(encoded, Prompts.create(points=[points], point_labels=[label]))
        for points, label in zip(clicks, labels, strict=True)
    ]
    assert torch.allclose(found.low_res, torch.cat([entry.low_res for entry in alone]), atol=1e-5)
    assert torch.allclose(found.ious, torch.cat([entry.ious for entry in alone]), atol=1e-5)


def test_padding_beside_a_box_is_left_out(model: SamModel) -> None:
    encoded, boxes = model.encode(picture()), torch.tensor([[4.0, 4, 30, 40], [10, 2, 60, 44]])
    points, labels = torch.tensor([[[0.0, 0]], [[30, 30]]]), torch.tensor([[PADDING], [ON]])
    found = model.segment(encoded, Prompts(points, labels, boxes))
    alone = model.segment(encoded, Prompts.create(boxes=boxes[:1].tolist()))
    assert torch.allclose(found.low_res[0], alone.low_res[0], atol=1e-5)


def test_our_decoder_equals_the_packages_over_several_images(model: SamModel) -> None:
    sam = model.sam
    sparse, dense = sam.prompt_encoder(None, torch.tensor([[1.0, 2, 30, 40], [5, 5, 60, 60], [0, 0, 9, 9]]), None)
    embeddings = torch.randn(2, 32, 8, 8)
    position = sam.prompt_encoder.get_dense_pe()
    of_image = torch.tensor([0, 1, 1])
    hidden, masks = run_decoder(
        sam.mask_decoder, sam.mask_decoder.iou_token.weight, embeddings[of_image], position, sparse, dense
    )
    for row, index in enumerate(of_image.tolist()):
        expected, ious = sam.mask_decoder.predict_masks(
            embeddings[index : index + 1], position, sparse[row : row + 1], dense[row : row + 1]
        )
        assert torch.allclose(masks[row], expected[0], atol=1e-5)
        assert torch.allclose(sam.mask_decoder.iou_prediction_head(hidden[row, 0]), ious[0], atol=1e-5)


def test_prompts_keep_their_place_under_autocast() -> None:
    encoder = build_prompt_encoder(dataclasses.replace(TINY, image_size=1024, patch_size=64))
    points = torch.tensor([[[1000.0, 700.0]], [[1001.0, 700.0]]])
    given = (points, torch.ones(2, 1)), torch.tensor([[8.0, 9.0, 801.0, 1000.0]] * 2), torch.randn(2, 1, 64, 64)
    exact = *encoder(*given), encoder.get_dense_pe()
    with torch.autocast("cpu", torch.bfloat16):
        found = *encoder(*given), encoder.get_dense_pe()
    assert not torch.equal(exact[0][0, 0], exact[0][1, 0])
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.equal(ours, theirs)


def test_our_prompt_encoder_equals_the_packages() -> None:
    ours = build_prompt_encoder(TINY)
    package = PromptEncoder(TINY.prompt_width, (8, 8), (64, 64), TINY.mask_channels)
    package.load_state_dict(ours.state_dict())
    points = torch.tensor([[[20.0, 10], [40, 30], [0, 0]], [[63, 1], [5, 5], [9, 60]]])
    labels = torch.tensor([[ON, OFF, PADDING], [OFF, ON, ON]])
    boxes = torch.tensor([[4.0, 4, 30, 40], [10, 0, 64, 48]])
    for box in (None, boxes):  # without a box, the package adds a padding point
        one, two = (encoder((points, labels), box, None)[0] for encoder in (ours, package))
        assert torch.equal(one, two)
        (one * torch.arange(one.numel()).view_as(one)).sum().backward()
        (two * torch.arange(two.numel()).view_as(two)).sum().backward()
    for (name, weight), other in zip(ours.named_parameters(), package.parameters(), strict=True):
        if "point" in name:
            assert weight.grad is not None and other.grad is not None
            assert torch.allclose(weight.grad, other.grad), name


def test_training_resizes_images_as_pillow_does_up_to_a_grey_level() -> None:
    for height, width in ((40, 57), (300, 200), (100, 64), (1, 300), (20_000, 20)):
        image = picture(height, width)
        fitted, _ = fit_image(image, 64)
        resized = fit_on_device(image, 64)
        assert resized.shape == fitted.shape and resized.dtype == torch.uint8
        if min(height, width) * 64 >= max(height, width):  # `fit_image` pads longer ones
            assert (resized.int() - fitted.int()).abs().max() <= 1
    image = picture(48, 64)
    assert fit_on_device(image, 64) is image


def test_small_pictures_get_fewer_clicks() -> None:
    sides = [EverythingConfig().clicks_along(*size) for size in ((20, 10), (128, 96), (256, 100), (4000, 10))]
    assert sides == [8, 16, 32, 32]


def test_everything_is_what_the_automatic_mask_generator_finds(model: SamModel) -> None:
    settings = EverythingConfig(points_per_side=4, min_iou=-9, min_stability=0.0)
    found = model.everything(picture(), settings)
    assert found.masks.shape[1:] == (48, 64)
    assert len(found) >= 1
    assert found.ious.tolist() == sorted(found.ious.tolist(), reverse=True)
    # The logits lie in the model's square, 64 x 64, of which the picture is the upper three quarters.
    shares = F.interpolate(F.pad(found.masks.float(), (0, 0, 0, 16))[:, None], (32, 32), mode="area")[:, 0]
    assert torch.allclose(found.low_res, 20 * (shares - 0.5))
    nothing = model.everything(picture(), dataclasses.replace(settings, min_iou=99.0))
    assert nothing.masks.shape == (0, 48, 64)
    assert nothing.to_list() == []


def test_everything_of_a_long_picture_takes_no_square_of_its_length(model: SamModel) -> None:
    settings = EverythingConfig(points_per_side=2, min_iou=-9, min_stability=0.0)
    torch.manual_seed(0)
    found = model.everything(torch.randint(0, 255, (3, 9, 20_000), dtype=torch.uint8), settings)
    assert len(found) >= 1 and found.masks.shape[1:] == (9, 20_000)
    shares = found.masks.float().mean(1).view(len(found), 32, 625).mean(2)  # one row of the 32 x 32 is the picture
    assert torch.allclose(found.low_res[:, 0], 20 * (shares - 0.5), atol=1e-4)
    assert bool((found.low_res[:, 1:] == -10).all())


# ------------------------------------------------------------------------------------------------------- bad input


def refused(model: SamModel, **prompts: object) -> str:
    with pytest.raises(InputError) as caught:
        model.segment(picture(), Prompts.create(**prompts))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_prompts_that_make_no_sense_are_told(model: SamModel) -> None:
    assert "points[0][0]: (64, 3) lies outside the image of 64 x 48" in refused(model, points=[[64, 3]])
    assert "points[1][0]" in refused(model, points=[[1, 1], [-1, 3]])
    assert "lies outside" in refused(model, points=[[math.nan, 3]])
    assert "boxes[0]: [70.0, 0.0, 90.0, 9.0] lies outside" in refused(model, boxes=[[70, 0, 90, 9]])
    assert "expected x0 < x1 and y0 < y1" in refused(model, boxes=[[5, 5, 5, 9]])
    assert "expected x0 < x1" in refused(model, boxes=[[0, 0, math.inf, 9]])
    assert "both on the object and off it" in refused(model, points=[[[3, 3], [3, 3]]], point_labels=[[1, 0]])
    assert "none is on the object" in refused(model, points=[[3, 3]], point_labels=[[0]])
    assert "expected 0 or 1" in refused(model, points=[[3, 3]], point_labels=[[0.9]])
    assert "points: 5, expected a list" in refused(model, points=5)
    assert "boxes: 7, expected a list" in refused(model, boxes=7)
    assert "expected logits [P, 32, 32]" in refused(model, boxes=[[1, 1, 5, 5]], masks=torch.zeros(1, 8, 8))
    assert "point_labels[0][0]: 7" in refused(model, points=[[3, 3]], point_labels=[[7]])
    assert "expected one label for each point" in refused(model, points=[[3, 3]], point_labels=[[1, 0]])
    assert "prompts: empty" in refused(model)
    assert "prompts: empty" in refused(model, boxes=[])
    assert "points[0]: empty" in refused(model, points=[np.zeros((0, 2))])
    assert "boxes: shape [1, 3]" in refused(model, boxes=[[1, 2, 3]])
    assert "boxes: expected lists of 4 numbers" in refused(model, boxes=[["a", 2, 3, 4]])
    assert "points[0]: expected lists of 2 numbers" in refused(model, points=[[10**400, 1]])
    assert "masks: not all finite" in refused(model, boxes=[[1, 1, 5, 5]], masks=torch.full((1, 32, 32), math.nan))
    assert "1 and 2 given" in refused(model, points=[[3, 3]], boxes=[[1, 1, 5, 5], [2, 2, 9, 9]])
    assert "given without points" in refused(model, boxes=[[1, 1, 5, 5]], point_labels=[[1]])


def test_a_box_across_the_edge_is_cut_off_there(model: SamModel) -> None:
    encoded = model.encode(picture())
    beyond = model.segment(encoded, Prompts.create(boxes=[[-20, 10, 90, 99]]))
    inside = model.segment(encoded, Prompts.create(boxes=[[0, 10, 64, 48]]))
    assert torch.equal(beyond.low_res, inside.low_res)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 20_000), (20_000, 20), (1, 300)])
def test_images_of_any_shape_get_masks_of_their_shape(model: SamModel, height: int, width: int) -> None:
    image = torch.full((3, height, width), 99, dtype=torch.uint8)
    for prompts in (Prompts.create(points=[[0, 0]]), Prompts.create(boxes=[[0, 0, width, height]])):
        assert model.segment(image, prompts).masks.shape == (1, height, width)


def test_checkpoints_load_without_pickle_and_misfits_are_told(tmp_path: object, model: SamModel) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "sam.pth"
    torch.save(model.sam.state_dict(), path)
    again = load_sam(path, TINY)
    prompts = Prompts.create(boxes=[[4, 4, 30, 40]])
    assert torch.equal(again.segment(picture(), prompts).low_res, model.segment(picture(), prompts).low_res)
    with pytest.raises(InputError, match="weights do not fit"):
        load_sam(path, dataclasses.replace(TINY, depth=3))
    torch.save({"weights": print}, path)
    with pytest.raises(InputError, match="cannot be read"):
        load_sam(path, TINY)
    with pytest.raises(InputError, match="cannot be read"):
        load_sam(Path(str(tmp_path)) / "missing.pth", TINY)
    with pytest.raises(InputError, match="expected a multiple"):
        SamModel(dataclasses.replace(TINY, prompt_width=36))


def test_published_models_are_the_packages() -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours, theirs = build_sam(VIT_B), sam_model_registry["vit_b"]()
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert ours.image_encoder.blocks[0].norm1.eps == theirs.image_encoder.blocks[0].norm1.eps


# -------------------------------------------------------------------------------------------------------- training


def test_losses_by_hand() -> None:
    logits, target = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
    # p = 1/2: -(1/2)^2 log(1/2) for both pixels
    assert focal_loss(logits, target).item() == pytest.approx(0.25 * math.log(2))
    # sum p t = 1/2, sum p = 1, sum t = 1: 1 - (1 + 1) / (2 + 1)
    assert dice_loss(logits, target).item() == pytest.approx(1 / 3)
    one, two = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert mask_ious(one, two).item() == pytest.approx(1 / 3)
    assert mask_ious(one & two & ~one, one & ~one).item() == 1.0


def test_only_the_best_of_an_ambiguous_prompts_masks_is_taught() -> None:
    assert best_mask_weights(torch.tensor([[5.0, 3.0, 1.0, 2.0], [1.0, 3.0, 4.0, 2.0]])).tolist() == [
        [1, 0, 1, 0],
        [1, 0, 0, 1],
    ]
    assert best_mask_weights(torch.tensor([[5.0]])).tolist() == [[1]]
    assert best_mask_weights(torch.zeros(0, 4)).shape == (0, 4)


def test_clicks_fall_where_the_mask_is_wrong() -> None:
    target = torch.zeros(2, 6, 8, dtype=torch.bool)
    predicted = target.clone()
    target[0, 2, 5] = True  # missed
    predicted[1, 4, 1] = True  # invented
    points, labels = corrective_clicks(predicted, target, torch.Generator().manual_seed(0))
    assert points.tolist() == [[5, 2], [1, 4]]
    assert labels.tolist() == [ON, OFF]


def test_jittered_boxes_stay_boxes_inside_the_image() -> None:
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [10.0, 10.0, 14.0, 50.0]]).repeat(100, 1)
    moved = jitter_boxes(boxes, 0.5, 20.0, 64, torch.Generator().manual_seed(0))
    assert bool((moved[:, 2:] >= moved[:, :2]).all())
    assert bool((moved >= 0).all()) and bool((moved <= 64).all())
    assert (moved - boxes).abs().max() <= 40  # two corners may change places
    assert torch.equal(jitter_boxes(boxes, 0.0, 20.0, 64, None), boxes)


def test_masks_follow_their_image_into_the_models_square() -> None:
    masks = torch.zeros(1, 24, 32, dtype=torch.bool)
    masks[0, 6:12, 8:16] = True
    assert boxes_of(resize_masks_to_square(masks, 64)).tolist() == [[16, 12, 32, 24]]  # twice as large, padded below
    assert boxes_of(masks[:0]).shape == (0, 4)
    assert boxes_of(torch.zeros(1, 4, 4, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


def squares(count: int = 2) -> MaskBatch:
    """Light squares on dark ground."""
    images, masks = [], []
    for index in range(count):
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[0, 8 + 8 * index : 32 + 8 * index, 16:48] = True
        masks.append(mask)
        images.append((mask.expand(3, -1, -1) * 160 + 40).to(torch.uint8))
    return MaskBatch(tuple(images), tuple(masks), tuple(torch.zeros(1, dtype=torch.int64) for _ in range(count)))


def test_images_without_objects_are_left_out_of_the_prompts() -> None:
    batch = squares()
    batch = dataclasses.replace(batch, masks=(batch.masks[0], batch.masks[1][:0]))
    batch = dataclasses.replace(batch, labels=(batch.labels[0], batch.labels[1][:0]))
    objects = sample_objects(batch, 64, 3, None)
    assert objects.images.tolist() == [0, 0, 0]
    assert objects.boxes.tolist() == [[16, 8, 48, 32]] * 3


def test_objects_of_which_nothing_is_left_are_not_asked_for() -> None:
    thin = torch.zeros(1, 640, 640, dtype=torch.bool)
    thin[0, 7:9, 100:300] = True  # between the rows that are looked at
    batch = MaskBatch((torch.zeros(3, 640, 640, dtype=torch.uint8),), (thin,), (torch.zeros(1, dtype=torch.int64),))
    objects = sample_objects(batch, 64, 3, None)
    assert (len(objects.labels), objects.boxes.shape, objects.masks.shape) == (0, (0, 4), (0, 64, 64))


def test_a_step_without_any_object_is_zero_and_has_gradients() -> None:
    batch = squares(1)
    batch = MaskBatch(batch.images, (batch.masks[0][:0],), (batch.labels[0][:0],))
    training = SamTraining(TINY, SamTrainingConfig())
    losses = training(batch)
    assert {name: float(value) for name, value in losses.items()} == {"focal": 0, "dice": 0, "iou": 0}
    sum(losses.values()).backward()
    assert all(weight.grad is not None for weight in training.parameters())


@pytest.mark.parametrize("rounds", [{}, {"clicks": 0}, {"clicks": 0, "repeats": 1}])
def test_every_weight_takes_part_in_a_step(rounds: dict[str, int]) -> None:
    training = SamTraining(TINY, SamTrainingConfig(**rounds))
    losses = training(squares(), torch.Generator().manual_seed(0))
    sum(losses.values()).backward()
    unused = [name for name, weight in training.named_parameters() if weight.requires_grad and weight.grad is None]
    assert unused == []


def test_the_same_seed_gives_the_same_losses() -> None:
    torch.manual_seed(0)
    training = SamTraining(TINY, SamTrainingConfig())
    first, again, other = (
        training(squares(), torch.Generator().manual_seed(seed))["dice"].item() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_two_images_are_overfitted() -> None:
    torch.manual_seed(0)
    training, generator = SamTraining(TINY, SamTrainingConfig()), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(training.parameters(), lr=2e-3)
    batch = squares()
    for _ in range(60):
        optimiser.zero_grad()
        sum(training(batch, generator).values()).backward()
        optimiser.step()
    training.eval()
    for image, masks in zip(batch.images, batch.masks, strict=True):
        by_box = training.model.segment(image, Prompts(boxes=boxes_of(masks)))
        by_click = training.model.segment(image, Prompts.create(points=[[32, 24]]))
        assert mask_ious(by_box.masks.flatten(1), masks.flatten(1)).item() > 0.85
        assert mask_ious(by_click.masks.flatten(1), masks.flatten(1)).item() > 0.7
