"""Draw boxes with their names on pictures."""

import colorsys
import zlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 320
GAP = 6
MIN_LETTERS, MIN_LINE = 12, 2
LETTERS_SHARE, LINE_SHARE = 1 / 45, 1 / 350
"""Heights of letters and widths of lines by the longer side of a picture, so that both can be seen when it is shown
smaller than it is."""

Colour = tuple[int, int, int]


def colour_of(key: int | str) -> Colour:
    """The colour of a label or of a name, which is the same in all pictures.

    Labels take golden-ratio steps around the hue circle, so that few are distinct; a name starts from its checksum.
    """
    index = zlib.crc32(key.encode()) if isinstance(key, str) else key
    red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.85, 0.8)
    return int(red * 255), int(green * 255), int(blue * 255)


def ink_on(colour: Colour) -> str:
    """Black or white, whichever is better read on a colour (relative luminance of ITU-R BT.709)."""
    red, green, blue = colour
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 115 else "white"


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one height in one, with a white gap."""
    both = Image.new("RGB", (left.width + right.width + GAP, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both


def draw_boxes(
    image: Image.Image,
    boxes: Tensor,
    texts: Sequence[str],
    labels: Sequence[int] | Sequence[str],
    *,
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """A copy of `image` with boxes [N, 4] (xyxy, its pixels); small pictures are enlarged so that text is readable.

    `labels` give the colours, by number or by name.
    """
    scale = max(1.0, min(min_side / max(1, min(image.size)), 6 * min_side / max(1, *image.size)))
    picture = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    longest = max(picture.size)
    line, margin = max(MIN_LINE, round(longest * LINE_SHARE)), max(2, round(longest * LETTERS_SHARE / 6))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(MIN_LETTERS, round(longest * LETTERS_SHARE)))
    rows = list(zip((boxes * scale).tolist(), texts, labels, strict=True))
    for box, text, label in reversed(rows):  # the first ones, which are the best, are drawn on top
        colour = colour_of(label)
        pen.rectangle(box, outline=colour, width=line)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * margin, bottom - top + 2 * margin
        x = min(max(0.0, box[0]), picture.width - width)
        y = box[1] - height if box[1] > height else box[1]
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        pen.text((x + margin - left, y + margin - top), text, font=font, fill=ink_on(colour))
    return picture
