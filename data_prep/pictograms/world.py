"""The pictogram world: a small visual world of glyphs with exact boxes, masks and captions.

Objects are glyphs of the DejaVu fonts that matplotlib ships, in named colours on noisy backgrounds. Everything
depends on a seed alone, so every measurement can be repeated on any machine.

    world = World.create(seed=0)
    scene = world.scene(rng, SCENES)          # pixels, boxes, masks, labels, colours
    text = world.caption(rng, scene)          # "a photo of a red umbrella and an anchor"
"""

import functools
import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ovd_models.prompts import with_article

GLYPHS: dict[str, int] = {
    "airplane": 0x2708, "anchor": 0x2693, "arrow": 0x2794, "asterisk": 0x2731, "atom": 0x269B, "benzene": 0x232C,
    "biohazard": 0x2623, "bishop": 0x265D, "bolt": 0x26A1, "caduceus": 0x2624, "cat": 0x1F431, "check mark": 0x2714,
    "cloud": 0x2601, "club": 0x2663, "comet": 0x2604, "cow": 0x1F42E, "cup": 0x2615, "daisy": 0x2740,
    "diamond": 0x2666, "die": 0x2684, "envelope": 0x2709, "exclamation mark": 0x2762, "flag": 0x2691,
    "flask": 0x2697, "flower": 0x273F, "frown": 0x2639, "gear": 0x2699, "hand": 0x261B, "heart": 0x2665,
    "hexagon": 0x2B22, "hot spring": 0x2668, "house": 0x2302, "ivy leaf": 0x2766, "keyboard": 0x2328,
    "king": 0x265A, "knight": 0x265E, "lily": 0x269C, "monkey": 0x1F435, "moon": 0x263D, "mouse": 0x1F42D,
    "music notes": 0x266B, "pawn": 0x265F, "pen nib": 0x2712, "pencil": 0x270F, "pentagon": 0x2B1F,
    "pickaxe": 0x2692, "queen": 0x265B, "radiation sign": 0x2622, "recycling sign": 0x267B, "reel": 0x2707,
    "rook": 0x265C, "scales": 0x2696, "scissors": 0x2702, "shamrock": 0x2618, "skull": 0x2620, "smiley": 0x263A,
    "snowflake": 0x2744, "snowman": 0x2603, "spade": 0x2660, "star": 0x2605, "sun": 0x2600, "swords": 0x2694,
    "telephone": 0x260E, "tulip": 0x2698, "umbrella": 0x2602, "vase": 0x26B1, "warning sign": 0x26A0,
    "wheelchair": 0x267F,
}  # fmt: skip
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 220), "orange": (245, 140, 20),
    "purple": (130, 50, 170), "brown": (120, 72, 30), "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
NUM_NOVEL = 17
NUM_RARE, NUM_COMMON = 12, 17  # of the 51 base categories; the other 22 are frequent
RELATIVE_FREQUENCY = {"rare": 0.1, "common": 0.4, "frequent": 1.0}
DISTRACTORS = (
    "on a sunny weekend", "from our last holiday", "best of the week", "seen downtown", "in great detail",
    "with a lot of colour", "my favourite view", "at the old market", "for the new season", "in the morning",
)  # fmt: skip
COLOUR_PROBABILITY = 0.7  # that a caption names an object's colour
GLYPH_RESOLUTION = 160
MIN_VISIBLE_PIXELS = 12


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a scene is drawn."""

    side: int
    """Width and height in pixels."""
    object_sizes: tuple[int, int]
    """Smallest and largest longer side of an unrotated object, in pixels."""
    object_counts: tuple[int, ...]
    """The number of objects is drawn uniformly from these."""
    font: str = "DejaVuSans"
    outline: bool = False
    """Draw the outlines of glyphs only."""
    background: Literal["clouds", "stripes"] = "clouds"
    """Clouds are smooth random colours."""
    rotation: float = 25.0
    """Largest rotation in degrees, in either direction."""
    noise: float = 6.0
    """Standard deviation of the pixel noise, in grey levels."""


PICTURES = Style(side=64, object_sizes=(24, 56), object_counts=(1, 1, 1, 2))
SCENES = Style(side=128, object_sizes=(24, 56), object_counts=(2, 3, 4, 5))
SECOND_STYLE = replace(SCENES, font="DejaVuSans-Oblique", outline=True, background="stripes")
STYLES: dict[str, Style] = {
    "first": SCENES,
    "second": SECOND_STYLE,
    "stripes": replace(SCENES, background="stripes"),
    "outlines": replace(SCENES, outline=True),
}
"""How scenes can be drawn: `stripes` and `outlines` are the first style with one change of the second."""


@dataclass(frozen=True)
class Scene:
    """A drawn image and its objects in drawing order, the last one on top."""

    pixels: npt.NDArray[np.uint8]
    """[H, W, 3] RGB."""
    boxes: npt.NDArray[np.float32]
    """[N, 4] xyxy in pixels, tight around the visible part."""
    masks: npt.NDArray[np.bool_]
    """[N, H, W] visible parts."""
    labels: npt.NDArray[np.int64]
    """[N] index into `World.names`."""
    colours: tuple[str, ...]
    """The colour of each object."""


@dataclass(frozen=True)
class World:
    """The categories and their split.

    Novel categories never carry boxes in training; base categories follow a long tail, as in LVIS.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    """`base` or `novel`, aligned with `names`."""
    frequencies: tuple[str, ...]
    """`frequent`, `common` or `rare` for base categories, empty for novel ones."""

    @classmethod
    def create(cls, seed: int = 0) -> "World":
        """Draw which of the names are novel, and how frequent the others are."""
        num_frequent = len(GLYPHS) - NUM_NOVEL - NUM_RARE - NUM_COMMON
        groups = np.repeat(["", "rare", "common", "frequent"], [NUM_NOVEL, NUM_RARE, NUM_COMMON, num_frequent])
        order = np.random.default_rng([seed, 0]).permutation(len(GLYPHS))
        frequencies = tuple(str(group) for group in groups[np.argsort(order)])
        splits = tuple("base" if frequency else "novel" for frequency in frequencies)
        return cls(names=tuple(GLYPHS), splits=splits, frequencies=frequencies)

    def base_probabilities(self) -> npt.NDArray[np.float64]:
        """[K] chance of each category in scenes with boxes: a long tail over base categories, 0 for novel ones."""
        weights = np.array([RELATIVE_FREQUENCY.get(frequency, 0.0) for frequency in self.frequencies])
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def scene(
        self, rng: np.random.Generator, style: Style, probabilities: npt.NDArray[np.float64] | None = None
    ) -> Scene:
        """Draw one scene of distinct categories, uniform unless `probabilities` [K] are given."""
        count = int(rng.choice(style.object_counts))
        labels = rng.choice(len(self.names), size=count, replace=False, p=probabilities)
        colours = rng.choice(list(COLOURS), size=count).tolist()
        return draw_scene(rng, style, labels, [self.names[label] for label in labels], colours)

    def caption(self, rng: np.random.Generator, scene: Scene) -> str:
        """A caption that names every object of the scene."""
        return "a photo of " + self._list_objects(rng, scene, range(len(scene.labels)))

    def loose_caption(self, rng: np.random.Generator, scene: Scene) -> str:
        """A caption as on the web: it omits about a third of the objects and adds words that describe none."""
        count = len(scene.labels)
        num_named = max(1, int(rng.binomial(count, 2 / 3)))
        named = rng.permutation(count)[:num_named].tolist()
        return f"{self._list_objects(rng, scene, named)} {rng.choice(DISTRACTORS)}"

    def _list_objects(self, rng: np.random.Generator, scene: Scene, indices: Sequence[int]) -> str:
        phrases = []
        for index in indices:
            colour = scene.colours[index] if rng.random() < COLOUR_PROBABILITY else ""
            phrases.append(with_article(self.names[scene.labels[index]], colour))
        return join_phrases(phrases) or "nothing"


def join_phrases(phrases: Sequence[str]) -> str:
    """`a cat`, `a cat and a dog`, `a cat, a dog and a bird`."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))


def single_objects(
    world: World, style: Style, count: int, *, seed: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Held-out pictures of one object each, cycling through categories: [count, S, S, 3] pixels, [count] labels."""
    rng = np.random.default_rng([seed, 3])
    labels = np.arange(count) % len(world.names)
    pixels = np.zeros((count, style.side, style.side, 3), np.uint8)
    for row, label in enumerate(labels):
        colour = str(rng.choice(list(COLOURS)))
        pixels[row] = draw_scene(rng, style, labels[row : row + 1], [world.names[label]], [colour]).pixels
    return pixels, labels


def draw_scene(
    rng: np.random.Generator,
    style: Style,
    labels: npt.NDArray[np.int64],
    names: Sequence[str],
    colours: Sequence[str],
) -> Scene:
    """Draw the named objects one over another; an object with too few visible pixels is left out."""
    canvas = _background(rng, style)
    alphas: list[npt.NDArray[np.float32]] = []
    kept: list[int] = []
    for index, name in enumerate(names):
        alpha = _place(rng, style, name, alphas)
        if alpha is None:
            continue
        colour = np.asarray(COLOURS[colours[index]], np.float32) + rng.normal(0, 6, 3).astype(np.float32)
        canvas += alpha[..., None] * (colour - canvas)
        alphas.append(alpha)
        kept.append(index)
    canvas += rng.normal(0, style.noise, canvas.shape).astype(np.float32)

    covered = np.zeros((style.side, style.side), bool)
    masks = np.zeros((len(kept), style.side, style.side), bool)
    for position in reversed(range(len(kept))):
        solid = np.asarray(alphas[position] >= 0.5)
        masks[position] = solid & ~covered
        covered |= solid
    visible = masks.sum(axis=(1, 2)) >= MIN_VISIBLE_PIXELS
    kept = list(itertools.compress(kept, visible))
    return Scene(
        pixels=np.clip(canvas, 0, 255).astype(np.uint8),
        boxes=boxes_of_masks(masks[visible]),
        masks=masks[visible],
        labels=np.asarray([labels[index] for index in kept], np.int64),
        colours=tuple(colours[index] for index in kept),
    )


def boxes_of_masks(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """[N, H, W] non-empty masks -> [N, 4] tight xyxy boxes; the right and bottom edges are exclusive."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in enumerate(masks):
        y, x = np.nonzero(mask)
        boxes[row] = x.min(), y.min(), x.max() + 1, y.max() + 1
    return boxes


def _place(
    rng: np.random.Generator, style: Style, name: str, placed: Sequence[npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32] | None:
    """[H, W] opacity of one object at a random size, rotation and position, or None if there is no room."""
    glyph = _glyph(GLYPHS[name], style.font, style.outline)
    angle, side = float(rng.uniform(-style.rotation, style.rotation)), style.side
    for _ in range(8):
        scale = rng.uniform(*style.object_sizes) / max(glyph.size)
        size = (max(4, round(glyph.width * scale)), max(4, round(glyph.height * scale)))
        stamp = glyph.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        stamp = stamp.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        stamp = stamp.crop(stamp.getbbox())
        if stamp.width > side - 2 or stamp.height > side - 2:
            continue
        x, y = int(rng.integers(1, side - stamp.width)), int(rng.integers(1, side - stamp.height))
        window = (slice(y, y + stamp.height), slice(x, x + stamp.width))
        if all((other[window] >= 0.5).sum() <= 0.2 * (other >= 0.5).sum() for other in placed):
            alpha = np.zeros((side, side), np.float32)
            alpha[window] = np.asarray(stamp, np.float32) / 255
            return alpha
    return None


def _background(rng: np.random.Generator, style: Style) -> npt.NDArray[np.float32]:
    side = style.side
    if style.background == "stripes":
        low, high = rng.uniform(90, 200, (2, 3))
        y, x = np.mgrid[0:side, 0:side]
        angle, period = rng.uniform(0, np.pi), rng.uniform(10, 30)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period) > 0
        return np.asarray(np.where(wave[..., None], low, high), np.float32)
    coarse = Image.fromarray(rng.integers(90, 210, (4, 4, 3), dtype=np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)


def encode_jpeg(image: Image.Image | npt.NDArray[np.uint8], *, quality: int = 95) -> bytes:
    """A picture or [H, W, 3] pixels as a JPEG file."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@functools.lru_cache(maxsize=512)
def _glyph(codepoint: int, font: str, outline: bool) -> Image.Image:
    """The glyph as a tight grey image."""
    face = _font(font, GLYPH_RESOLUTION)
    image = Image.new("L", (GLYPH_RESOLUTION * 2, GLYPH_RESOLUTION * 2))
    draw, origin = ImageDraw.Draw(image), (GLYPH_RESOLUTION // 2, GLYPH_RESOLUTION // 4)
    if outline:
        draw.text(origin, chr(codepoint), font=face, fill=0, stroke_width=7, stroke_fill=255)
    draw.text(origin, chr(codepoint), font=face, fill=0 if outline else 255)
    return image.crop(image.getbbox())


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf")), size)


def contact_sheet(world: World, *, seed: int = 0, side: int = 84) -> Image.Image:
    """Every category once, novel ones framed, above scenes of both styles with their boxes."""
    columns, big = 14, 164
    rows = -(-len(world.names) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + 16) + 2 * (big + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    label_font = _font("DejaVuSans", 9)
    rng = np.random.default_rng([seed, 7])
    colour_of = ["crimson" if split == "novel" else "black" for split in world.splits]
    for index, name in enumerate(world.names):
        x, y = index % columns * side, index // columns * (side + 16)
        style = replace(PICTURES, side=side - 6, object_sizes=(52, 56), rotation=0.0)
        colour = str(rng.choice(list(COLOURS)))
        scene = draw_scene(rng, style, np.array([index]), [name], [colour])
        if world.splits[index] == "novel":
            draw.rectangle((x, y, x + side - 1, y + side + 14), outline="crimson", width=2)
        sheet.paste(Image.fromarray(scene.pixels), (x + 3, y + 3))
        draw.text((x + 4, y + side - 1), name, font=label_font, fill=colour_of[index])
    for line, style in enumerate((SCENES, SECOND_STYLE)):
        for column in range((columns * side) // (big + 4)):
            scene = world.scene(rng, style)
            view = Image.fromarray(scene.pixels).resize((big, big), Image.Resampling.LANCZOS)
            pen = ImageDraw.Draw(view)
            for box, label in zip(scene.boxes * (big / style.side), scene.labels, strict=True):
                pen.rectangle(box.tolist(), outline=colour_of[label])
            sheet.paste(view, (column * (big + 4), rows * (side + 16) + 8 + line * (big + 8)))
    return sheet


def main() -> None:
    """Save the contact sheet: `python -m data_prep.pictograms.world docs/pictograms.png`."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "pictograms.png")
    contact_sheet(World.create()).quantize(192).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
