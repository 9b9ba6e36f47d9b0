import numpy as np
import torch

from ovd_models.codet.drawing import attention_map, draw_attention, draw_similarity


def test_heat_is_the_attention_around_a_pixel_by_hand() -> None:
    # Two boxes that overlap in the second column: 0.25, 0.25 + 0.5 and 0.5, divided by 0.75.
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0]])
    found = attention_map(boxes, torch.tensor([0.25, 0.5]), 2, 3)
    assert torch.allclose(found, torch.tensor([[1 / 3, 1.0, 2 / 3], [0, 0, 0]]))


def test_pixels_without_attention_are_dark() -> None:
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    boxes = [torch.tensor([[0.0, 0.0, 32.0, 64.0]])] * 2
    sheet = draw_attention([image, image], boxes, [torch.ones(1)] * 2, "step 1: anchor", ["an anchor"] * 2)
    pixels = np.asarray(sheet)
    assert sheet.size == (2 * 320 + 6, 320 + 48)
    assert pixels[300, 80].tolist() == [200] * 3
    assert pixels[300, 280].tolist() == [80] * 3


def test_a_proposal_without_attention_is_not_drawn() -> None:
    image, boxes = torch.full((3, 64, 64), 200, dtype=torch.uint8), torch.tensor([[0.0, 0, 32, 64], [40, 8, 60, 56]])
    one, both = (
        draw_attention([image], [boxes], [torch.tensor(weights)], "", [""]) for weights in ([1, 0.0], [1, 0.5])
    )
    edge = (24 + 150, 200)  # row and column of the second box's left side, five times as large
    assert np.asarray(one)[edge].tolist() == [80] * 3
    assert np.asarray(both)[edge].tolist() != [80] * 3


def test_an_image_without_a_proposal_is_drawn_as_it_is() -> None:
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    sheet = draw_attention([image], [torch.zeros(0, 4)], [torch.zeros(0)], "step 1: anchor", [""])
    assert np.asarray(sheet)[200, 160].tolist() == [200] * 3
    assert min(draw_similarity(torch.zeros(0, 0), [0]).size) > 0


def test_a_similarity_matrix_is_brightest_at_its_maximum_and_separates_images() -> None:
    similarity = torch.eye(4)
    picture = np.asarray(draw_similarity(similarity, [1, 3]))
    assert picture.shape == (640, 640, 3)
    assert picture[80, 80].sum() > picture[80, 400].sum()
    assert picture[320, 160].tolist() == [255] * 3
