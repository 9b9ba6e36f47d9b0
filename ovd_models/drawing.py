"""Draw boxes with their names on pictures."""

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 320


def colour_of(index: int) -> tuple[int, int, int]:
    """A distinct colour for each label: golden-ratio steps around the hue circle."""
    red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.85, 0.8)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_boxes(
    image: Image.Image, boxes: Tensor, texts: Sequence[str], labels: Sequence[int], *, min_side: int = MIN_SIDE
) -> Image.Image:
    """A copy of `image` with boxes [N, 4] (xyxy, its pixels); small pictures are enlarged so that text is readable."""
    scale = max(1.0, min(min_side / max(1, min(image.size)), 6 * min_side / max(1, *image.size)))
    picture = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    rows = list(zip((boxes * scale).tolist(), texts, labels, strict=True))
    for box, text, label in reversed(rows):  # the first ones, which are the best, are drawn on top
        colour = colour_of(label)
        pen.rectangle(box, outline=colour, width=2)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(max(0.0, box[0]), picture.width - (right - left) - 2)
        y = box[1] - (bottom - top) - 5 if box[1] > bottom - top + 5 else box[1]
        pen.rectangle((x, y, x + right - left + 3, y + bottom - top + 4), fill=colour)
        pen.text((x + 2 - left, y + 2 - top), text, font=font, fill="white")
    return picture
