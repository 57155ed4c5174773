"""Two data sets drawn from a seed, nothing downloaded: glyphs stand in for MNIST, shapes for CIFAR-10.

Every picture starts from a character of one of matplotlib's own fonts, turned once into a signed distance field: how
far a point lies inside the ink (positive) or outside it (negative). A picture reads that field through a random smooth
warp; raising the field makes the strokes heavier, and a flatter ramp from paper to ink blurs them.

The bytes depend on the seed alone, not on the processor: what is summed in floats is whole numbers that float64 holds
exactly (see `polynomial`), all else is integer arithmetic. Images come in blocks with a random stream each, so the
first 100 of 200 images are the 100 images.
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.random import Generator, default_rng
from PIL import Image, ImageFont

from .image_set import ImageSet

PARTS = ("victim", "proxy", "outliers")
STREAMS = (*PARTS, "matched")  # of random numbers, by their place
FIELD, BOX = 128, 92  # side of a distance field, and of the box that its character just fits, in cells
UNIT = 16  # a field counts distance in sixteenths of a cell
HALF_STROKE = 6 * UNIT  # of a digit or letter, the same in every font
ROUNDS = 20  # a block is this many rounds through all classes
FIXED = 2.0**20  # binary places of a polynomial's coefficients


class Part(NamedTuple):
    """What one part is drawn from: a character for each class, and the fonts (file names) that hold them.

    `ramp` is the width of an edge from paper to ink, in cells (4.4 to a pixel), `bend` the largest curvature of the
    paper.
    """

    characters: str
    fonts: tuple[str, ...]
    classes: tuple[str, ...]
    ramp: tuple[int, int] = (5, 11)
    bend: float = 0.25


# Only fonts that every matplotlib since 3.9 brings along (cmti10, say, is newer).
DIGITS, LETTERS = "0123456789", "ԱԲԳԶԹԺԽԾԿՀՁՂ"  # the letters are Armenian
SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "cmss10")
SERIF = ("STIXGeneral", "STIXGeneralItalic", "cmr10")
MATCHED = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "cmtt10")
GLYPHS = {
    "victim": Part(DIGITS, SANS, tuple(DIGITS)),
    # As if from another printer: crisper and on wavier paper. With the letter forms alone a short-trained autoencoder
    # hardly tells the two apart, while real EMNIST digits differ from MNIST's in how they were scanned too.
    "proxy": Part(DIGITS, SERIF, tuple(DIGITS), ramp=(3, 7), bend=0.4),
    "outliers": Part(LETTERS, ("DejaVuSans", "DejaVuSerif"), tuple(LETTERS)),
    # From the victim's own printer: with serifs all the same, and chosen so that strokes are as long and as thick.
    "matched": Part(DIGITS, MATCHED, tuple(DIGITS)),
}

PLAIN = ("disc", "square", "triangle", "star", "heart", "cross", "half disc", "pentagon", "arrow", "bow tie")
FANCY = ("spade", "club", "note", "plane", "phone", "flag", "umbrella", "flower", "cloud", "horse")
SHAPES = {
    "victim": Part("●■▲★♥✚◗⬟➤⧓", ("DejaVuSans",), PLAIN),
    "proxy": Part("♠♣♪✈☎⚑☂✿☁♞", ("DejaVuSans",), FANCY),
}
TEXTURES = ("stripes", "checks", "rings", "folds", "spots", "grain")
# Two hexagons of hues, half a step apart, with the same mean in every channel: no mean gives the domain away.
PALETTES = {
    "victim": ((200, 60, 60), (200, 200, 60), (60, 200, 60), (60, 200, 200), (60, 60, 200), (200, 60, 200)),
    "proxy": ((215, 130, 45), (130, 215, 45), (45, 215, 130), (45, 130, 215), (130, 45, 215), (215, 45, 130)),
}
PALETTES["outliers"] = PALETTES["victim"] + PALETTES["proxy"]


def glyphs(part: str, count: int, seed: int = 0) -> ImageSet:
    """Digits in typefaces without serifs (victim) and with them (proxy, matched), or Armenian letters (outliers).

    Stroke weight and size follow one law in every part. The proxy's edges are crisper and its lines more bent, and the
    mean squared Laplacian alone tells it from the victim's digits; "matched" is drawn exactly as the victim's digits are,
    so that nothing but the typefaces tells it from them.

    Args:
        part: "victim", "proxy", "outliers" or "matched"; no part shares a typeface of digits with the victim, nor a
            random stream with any other.
        count: how many images.
        seed: another seed draws other images of the same kind.

    Returns:
        uint8 [count, 1, 28, 28], 0 the paper and 255 the ink; classes balanced.

    Raises:
        ValueError: unknown part, or count < 1.
    """
    check(part, count, GLYPHS)
    return assemble("glyphs", part, count, seed, GLYPHS[part].classes, draw_glyphs)


def shapes(part: str, count: int, seed: int = 0) -> ImageSet:
    """Textured shapes on textured ground: plain ones (victim), fancy ones (proxy), or texture alone (outliers).

    Args:
        part: "victim", "proxy" or "outliers"; victim and proxy share no shape, colour or random stream.
        count: how many images.
        seed: another seed draws other images of the same kind.

    Returns:
        uint8 [count, 3, 32, 32]; classes balanced.

    Raises:
        ValueError: unknown part, or count < 1.
    """
    check(part, count, PARTS)
    if part == "outliers":
        return assemble("shapes", part, count, seed, TEXTURES, draw_textures)
    return assemble("shapes", part, count, seed, SHAPES[part].classes, draw_shapes)


def check(part: str, count: int, known: Iterable[str]) -> None:
    if part not in known:
        raise ValueError(f"unknown part {part!r}; choose one of {', '.join(known)}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def assemble(name: str, part: str, count: int, seed: int, classes: tuple[str, ...], draw: Callable) -> ImageSet:
    """`count` images, block after block; `draw(part, labels, rng)` -> uint8 [n, C, H, W]."""
    images, labels = [], []
    for block in range(-(-count // (ROUNDS * len(classes)))):
        rng = default_rng([("glyphs", "shapes").index(name), STREAMS.index(part), block, seed])
        # Every class once a round, in random order: balanced at any count.
        labels.append(rng.permuted(np.tile(np.arange(len(classes)), (ROUNDS, 1)), axis=1).ravel())
        images.append(draw(part, labels[-1], rng))
    # Copied, so that a short set does not keep a whole block in memory.
    images, labels = np.concatenate(images)[:count].copy(), np.concatenate(labels)[:count].astype(np.int64)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, f"{name} {part}")


# ---- characters ----


@cache
def distance_field(font: str, character: str, half_stroke: int | None) -> np.ndarray:
    """int32 [FIELD, FIELD], in 1/UNIT cells: depth inside the character's ink, minus the distance to it outside."""
    mask = render(font, character)
    field = np.rint(UNIT * (np.sqrt(squared_distance(~mask)) - np.sqrt(squared_distance(mask))))
    if half_stroke:  # The depth within a stroke averages half of its half-width.
        field += half_stroke - np.rint(2 * field[field > 0].mean())
    return field.astype(np.int32)


def render(font: str, character: str) -> np.ndarray:
    """bool [FIELD, FIELD]: the character, as large as fits the box, in the middle."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    face = ImageFont.truetype(str(path), 2 * BOX, layout_engine=ImageFont.Layout.BASIC)
    mask = face.getmask(character, mode="L")
    picture = Image.frombytes("L", mask.size, bytes(mask))
    picture = picture.crop(picture.getbbox())
    width, height = (max(1, side * BOX // max(picture.size)) for side in picture.size)
    canvas = Image.new("L", (FIELD, FIELD))
    canvas.paste(picture.resize((width, height), Image.Resampling.BOX), ((FIELD - width) // 2, (FIELD - height) // 2))
    return np.asarray(canvas) > 127


def squared_distance(mask: np.ndarray) -> np.ndarray:
    """int32 [S, S]: from each cell to the nearest True cell, along rows and then along columns."""
    line = np.arange(len(mask), dtype=np.int32)
    gap = (line[:, None] - line) ** 2
    along_rows = (np.where(mask, 0, 2 * FIELD**2).astype(np.int32)[:, None, :] + gap).min(axis=2)
    return (along_rows.T[:, None, :] + gap).min(axis=2).T


# ---- smooth random functions of the picture's plane ----


def polynomial(coefficients: np.ndarray, side: int) -> np.ndarray:
    """Quadratic functions of the plane: float64 [n, 6] -> int32 [n, side, side], rounded down.

    The coefficients go with 1, x, y, x*y, x*x, y*y, where x and y run from -1 to 1 (pixel centres).
    They are rounded to whole multiples of 1/FIXED and the terms are whole numbers too, so that every product and sum is
    exact in float64, and the order in which a processor adds them cannot change a bit.
    """
    line = np.arange(1.0 - side, side, 2)  # odd or even whole numbers: x * side
    y, x = (grid.ravel() for grid in np.meshgrid(line, line, indexing="ij"))
    terms = np.stack([np.full_like(x, side * side), side * x, side * y, x * y, x * x, y * y])
    values = np.rint(coefficients * FIXED) @ terms
    return np.floor(values / (FIXED * side * side)).astype(np.int32).reshape(-1, side, side)


def warp(rng: Generator, n: int, side: int, reach: float, shift: float, turn: float, bend: float) -> tuple:
    """Random rows and columns of the distance field to read at each pixel: two int32 [n, side, side].

    `reach` cells from the centre to the edge; `shift`, `turn` and `bend` are the largest move, slope and curvature,
    relative to `reach`.
    """

    def spread(width, columns):
        return rng.uniform(-width, width, (n, columns))

    own, cross = 1 + spread(0.12, 2), spread(turn, 1) * [1, -1] + spread(turn / 2, 2)
    x = np.c_[spread(shift, 1), own[:, :1], cross[:, :1], spread(bend, 3)]
    y = np.c_[spread(shift, 1), cross[:, 1:], own[:, 1:], spread(bend, 3)]
    x, y = (np.clip(polynomial(reach * axis, side) + FIELD // 2, 0, FIELD - 1) for axis in (x, y))
    return y, x


def direction(rng: Generator, n: int) -> np.ndarray:
    """float64 [n, 2]: the larger part is 1 or -1. A square, not a circle: sine and cosine differ between machines."""
    way = rng.uniform(-1, 1, (n, 2))
    return way / np.abs(way).max(axis=1, keepdims=True)


def column(rng: Generator, low: int, high: int, n: int, channels: int = 1) -> np.ndarray:
    """int32 [n, channels, 1, 1]: random whole numbers low..high, to be spread over an image's pixels."""
    return rng.integers(low, high + 1, (n, channels, 1, 1)).astype(np.int32)


# ---- glyphs ----


def draw_glyphs(part: str, labels: np.ndarray, rng: Generator) -> np.ndarray:
    """labels [n] -> uint8 [n, 1, 28, 28]."""
    n, (characters, fonts, _, (crisp, soft), bend) = len(labels), GLYPHS[part]
    fields = np.stack([[distance_field(font, c, HALF_STROKE) for c in characters] for font in fonts])
    y, x = warp(rng, n, 28, reach=62, shift=0.15, turn=0.3, bend=bend)
    font = rng.integers(len(fonts), size=n)
    depth = fields[font[:, None, None], labels[:, None, None], y, x][:, None]
    # The pen presses harder in one corner than in another: strokes differ by up to 2 pixels, and thin ones break.
    pressure = np.c_[rng.uniform(-3, 3, n), rng.uniform(-2.5, 2.5, (n, 2)), np.zeros((n, 3))]
    weight = polynomial(UNIT * pressure, 28)[:, None]
    ramp = column(rng, crisp * UNIT, soft * UNIT, n)
    ink = column(rng, 200, 255, n)
    return np.clip((depth + weight) * ink // ramp + ink // 2, 0, ink).astype(np.uint8)


# ---- shapes ----


def wave(coefficients: np.ndarray, side: int) -> np.ndarray:
    """A triangle wave, -128..128, of a random quadratic phase in periods: [n, 6] -> int32 [n, side, side]."""
    return np.abs(polynomial(512 * coefficients, side) % 512 - 256) - 128


def texture(kind: np.ndarray, rng: Generator, side: int) -> np.ndarray:
    """A pattern a picture, -128..128: kind int [n] (index in TEXTURES) -> int32 [n, 1, side, side]."""
    n = len(kind)
    none = np.zeros((n, 1))
    flat = rng.uniform(1.5, 3, (n, 1)) * direction(rng, n)  # half as many periods as fit the picture
    first = np.c_[rng.uniform(0, 1, n), flat, none, none, none]
    second = np.c_[rng.uniform(0, 1, n), -flat[:, 1:], flat[:, :1], none, none, none]
    middle, curve = rng.uniform(-0.6, 0.6, (n, 2)), rng.uniform(2, 4, (n, 1))
    rings = np.c_[rng.uniform(0, 1, n), -2 * curve * middle, none, curve, curve]
    folds = np.c_[rng.uniform(0, 1, n), flat / 2, rng.uniform(-3, 3, (n, 3))]
    a, b = wave(first, side), wave(second, side)
    grain = rng.integers(-128, 129, (n, side // 2, side // 2), dtype=np.int32).repeat(2, axis=1).repeat(2, axis=2)
    checks = np.where((a > 0) == (b > 0), 100, -100)
    spots = np.where(a + b > 64, 128, -80)
    patterns = (a, checks, wave(rings, side), wave(folds, side), spots, grain)
    return np.choose(kind[:, None, None], patterns)[:, None]


def paint(colour: np.ndarray, kind: np.ndarray, rng: Generator, side: int) -> np.ndarray:
    """A texture in a tint around a colour: int [n, 3], int [n] -> int32 [n, 3, side, side]."""
    n = len(kind)
    return colour[:, :, None, None] + (texture(kind, rng, side) * column(rng, -70, 70, n, 3) >> 7)


def two_colours(part: str, n: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two different colours of the part's palette for each picture, jittered: int32 [n, 3] each."""
    palette = np.array(PALETTES[part], dtype=np.int32)
    first = rng.integers(len(palette), size=n)
    second = (first + rng.integers(1, len(palette), size=n)) % len(palette)
    return tuple(palette[which] + rng.integers(-30, 31, (n, 3), dtype=np.int32) for which in (first, second))


def finish(images: np.ndarray, rng: Generator) -> np.ndarray:
    """Light and camera noise: int32 [n, 3, H, W] -> uint8."""
    n = len(images)
    noise = rng.integers(-16, 17, images.shape, dtype=np.int8)
    return np.clip(images + column(rng, -30, 30, n) + noise, 0, 255).astype(np.uint8)


def draw_shapes(part: str, labels: np.ndarray, rng: Generator) -> np.ndarray:
    """labels [n] -> uint8 [n, 3, 32, 32]."""
    n, (characters, (font,), *_) = len(labels), SHAPES[part]
    fields = np.stack([distance_field(font, c, None) for c in characters])
    y, x = warp(rng, n, 32, reach=70, shift=0.2, turn=0.4, bend=0.15)
    depth = fields[labels[:, None, None], y, x][:, None]
    cover = np.clip(depth + 2 * UNIT, 0, 4 * UNIT)  # an edge of a pixel's width
    # A strip in front of the shape hides part of it.
    strip = np.c_[rng.uniform(-0.6, 0.6, n), direction(rng, n), np.zeros((n, 3))]
    cover[np.abs(polynomial(128 * strip, 32)[:, None]) < column(rng, 0, 16, n)] = 0
    ground, shape = (
        paint(colour, rng.integers(len(TEXTURES), size=n), rng, 32) for colour in two_colours(part, n, rng)
    )
    return finish(ground + ((shape - ground) * cover // (4 * UNIT)), rng)


def draw_textures(part: str, labels: np.ndarray, rng: Generator) -> np.ndarray:
    """labels [n], which index TEXTURES -> uint8 [n, 3, 32, 32]."""
    colour, _ = two_colours(part, len(labels), rng)
    return finish(paint(colour, labels, rng, 32), rng)
