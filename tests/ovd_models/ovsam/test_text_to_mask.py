import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.errors import InputError
from ovd_models.ovsam.text_to_mask import (
    WINDOWS,
    EncodedTextToMask,
    TextToMask,
    TextToMaskConfig,
    TextToMaskModelConfig,
    add_name_points,
    central_points,
    place_windows,
)
from ovd_models.sam import model as sam
from ovd_models.sam.model import SamConfig
from ovd_models.sam.training import mask_ious
from ovd_models.segments import ON, PADDING, MaskBatch, Prompts

SAM = SamConfig(image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_width=32)


@pytest.fixture
def model() -> TextToMask:
    torch.manual_seed(0)
    return TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig(max_margin=1.2, windows=WINDOWS)))


def two_squares() -> MaskBatch:
    """A red and a blue square on one picture."""
    image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:28, 8:28] = masks[1, 36:56, 36:56] = True
    image[:, masks[0]] = torch.tensor([[250], [10], [10]], dtype=torch.uint8)
    image[:, masks[1]] = torch.tensor([[10], [10], [250]], dtype=torch.uint8)
    return MaskBatch((image,), (masks,), (torch.tensor([0, 1]),))


def crops_of(model: TextToMask, batch: MaskBatch) -> Tensor:
    """CLIP's embeddings of the two squares, as a text tower that agrees with the image tower would give them."""
    colours = torch.stack([batch.images[0][:, mask][:, 0] for mask in batch.masks[0]])
    flat = (colours[:, :, None, None] / 255 - 0.5) / 0.5
    return F.normalize(model.clip.tower(flat.expand(-1, -1, 64, 64)), dim=-1)


def test_names_give_the_masks_of_what_they_name() -> None:
    # Without windows: an untrained CLIP knows no things, so they would put the points anywhere.
    torch.manual_seed(0)
    model = TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig(max_margin=1.2)))
    batch, generator = two_squares(), torch.Generator().manual_seed(0)
    model.sam.requires_grad_(True)  # here SAM itself is untrained
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
    model.train()
    for _ in range(150):
        optimiser.zero_grad()
        sum(model(batch, generator).values()).backward()
        optimiser.step()
    model.eval()
    text = crops_of(model, batch)
    model.set_text_centre(text)
    found = model.segment_text(batch.images[0], text)
    ious = mask_ious(found.masks.flatten(1), batch.masks[0].flatten(1))
    swapped = mask_ious(found.masks.flatten(1), batch.masks[0].flip(0).flatten(1))
    assert (ious > swapped + 0.3).all(), (ious, swapped)


def test_a_name_becomes_a_point_on_what_it_names(model: TextToMask) -> None:
    text, centres = torch.eye(3)[:2], torch.tensor([[40.0, 8.0], [8.0, 30.0], [5.0, 5.0]])
    image = EncodedTextToMask(model.sam.encode(two_squares().images[0]), torch.eye(3), centres)
    located = add_name_points(image, text, None)
    assert located is not None and located.points is not None and located.point_labels is not None
    assert located.points[:, 0].tolist() == [[40.0, 8.0], [8.0, 30.0]]
    assert (located.point_labels == ON).all()


def test_the_points_of_training_are_near_the_objects_centres() -> None:
    boxes = torch.tensor([[0.0, 10.0, 40.0, 20.0]]).expand(200, 4)
    points = central_points(boxes, torch.Generator().manual_seed(0))
    assert (points >= torch.tensor([10.0, 12.5])).all() and (points <= torch.tensor([30.0, 17.5])).all()
    assert (points.amax(0) - points.amin(0) > torch.tensor([18.0, 4.5])).all()


def test_without_windows_a_name_alone_is_the_prompt(model: TextToMask, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig())).eval()
    plain.load_state_dict(model.state_dict())
    image, names = two_squares().images[0], F.normalize(torch.randn(2, 128), dim=-1)
    assert add_name_points(plain.encode(image), names, None) is None
    assert plain.segment_text(image, names).masks.shape == (2, 64, 64)
    assert float(plain(two_squares())["dice"]) > 0


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 64), (64, 3), (1, 64)])
def test_windows_cover_an_image_of_any_shape(height: int, width: int) -> None:
    centres, boxes = place_windows(height, width, 64, (0.2, 0.5))
    assert len(centres) == len(boxes) == 2 * -(-height // 4) * -(-width // 4)
    assert (centres > 0).all() and (centres < torch.tensor([width, height])).all()
    half = torch.tensor([6.4, 16.0]).repeat_interleave(len(centres) // 2)[:, None]
    limits = torch.tensor([width, height, width, height])
    uncut = torch.cat([centres - half, centres + half], 1)
    assert torch.allclose(boxes, uncut.clamp(min=torch.zeros(4), max=limits.float()))


def test_many_names_are_asked_for_in_parts(model: TextToMask, monkeypatch: pytest.MonkeyPatch) -> None:
    image, names = two_squares().images[0], F.normalize(torch.randn(5, 128), dim=-1)
    whole = model.eval().segment_text(image, names)
    monkeypatch.setattr(sam, "PROMPTS_AT_A_TIME", 2)
    parts = model.segment_text(image, names)
    assert parts.masks.shape == (5, 64, 64)
    assert torch.allclose(parts.low_res, whole.low_res, atol=1e-4)


def test_only_decoder_and_projection_learn(model: TextToMask) -> None:
    losses = model(two_squares(), torch.Generator().manual_seed(0))
    assert set(losses) == {"focal", "dice", "iou"}
    sum(losses.values()).backward()
    learnt = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert all("mask_decoder" in name or name.startswith("token") for name in learnt)
    assert "token.weight" in learnt


def test_an_image_without_objects_teaches_nothing(model: TextToMask) -> None:
    batch = two_squares()
    batch = MaskBatch(batch.images, (batch.masks[0][:0],), (batch.labels[0][:0],))
    assert {float(value) for value in model(batch).values()} == {0.0}


def test_no_name_gives_no_mask_and_one_name_no_centre(model: TextToMask) -> None:
    found = model.segment_text(two_squares().images[0], torch.zeros(0, 128))
    assert found.masks.shape == (0, 64, 64)
    with pytest.raises(InputError, match="expected at least 2"):
        model.set_text_centre(torch.zeros(1, 128))


def test_clicks_and_earlier_masks_join_the_name_as_prompts(model: TextToMask) -> None:
    image, names = two_squares().images[0][:, ::2, ::2], F.normalize(torch.randn(2, 128), dim=-1)
    before = model.eval().segment_text(image, names)
    points, labels = torch.tensor([[[3.0, 5.0]], [[20.0, 9.0]]]), torch.tensor([[1], [0]])
    after = model.segment_text(image, names, Prompts(points, labels, masks=before.low_res))
    encoder, encoded = model.sam.sam.prompt_encoder, model.sam.encode(image)
    located = add_name_points(model.encode(image), names, None)
    assert located is not None and located.points is not None and located.point_labels is not None
    given = torch.cat([located.points, points * 2], 1)  # the input is twice as large
    labelled = torch.cat([located.point_labels, labels], 1)
    clicked, dense = encoder((given, labelled), None, before.low_res[:, None])
    sparse = torch.cat([model.token(names)[:, None], clicked], 1)
    low, ious = model.sam.decode(encoded.embedding.expand(2, -1, -1, -1), sparse, dense)
    assert torch.allclose(after.low_res, low[:, 0], atol=1e-5) and torch.allclose(after.ious, ious[:, 0], atol=1e-5)
    assert not torch.allclose(after.low_res, before.low_res, atol=1e-3)
    padded = F.pad(points, (0, 0, 0, 1)), torch.stack([F.pad(labels[0], (0, 1), value=PADDING), labels.new_ones(2)])
    mixed = model.segment_text(image, names, Prompts(*padded, masks=before.low_res))
    assert torch.allclose(mixed.low_res[0], after.low_res[0], atol=1e-5)
    with pytest.raises(InputError, match="clicks: 2, expected points for each of the 1 names"):
        model.segment_text(image, names[:1], Prompts(points, labels))


def test_each_click_of_training_is_where_the_last_mask_is_wrong(
    model: TextToMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    clicking = TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig(clicks=2, windows=WINDOWS)))
    clicking.load_state_dict(model.state_dict())
    asked: list[Prompts | None] = []
    decode = clicking._decode

    def noted(embedding: Tensor, centred: Tensor, clicks: Prompts | None = None) -> tuple[Tensor, Tensor]:
        asked.append(clicks)
        return decode(embedding, centred, clicks)

    monkeypatch.setattr(clicking, "_decode", noted)
    losses = clicking(two_squares(), torch.Generator().manual_seed(0))
    points = [clicks.points for clicks in asked if clicks is not None and clicks.points is not None]
    assert [len(of_object[0]) for of_object in points] == [1, 2, 3]
    assert torch.equal(points[1][:, :1], points[0]) and torch.equal(points[2][:, :2], points[1])
    second = asked[1]
    assert second is not None and second.masks is not None and not second.masks.requires_grad
    plain = model(two_squares(), torch.Generator().manual_seed(0))
    assert losses["dice"] != plain["dice"]  # the mean of three rounds


def test_small_objects_may_be_left_out(model: TextToMask) -> None:
    large = TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig(min_area=401)))
    assert {float(value) for value in large(two_squares()).values()} == {0.0}  # the squares have 400 pixels
    assert float(model(two_squares())["dice"]) > 0
