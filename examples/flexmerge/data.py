"""Eight image tasks made from the real images that scikit-learn carries; nothing is downloaded.

From handwritten digits:

* ``digit``: which digit it is (10 classes);
* ``rotation``: by how many quarter turns a digit was rotated (4).

From tiles of photographs:

* ``scene``: what a tile shows (6);
* ``channels``: in which order the colour channels of a tile are, or that it is grey (7);
* ``seam``: whether a tile is one piece or was put together from two, and in which direction (3).

From both:

* ``place``: where on a tile a small digit was stuck (9);
* ``count``: how many digits, none to four, were stuck on a tile (5);
* ``ink``: in which colour a digit was written on a tile (8).

The source images are divided into splits before anything is derived from them, as in the
quickstart. Here the division is the same for every seed of the training: ``evaluate`` knows only
the name of a task, and must not test with images that a model was trained on.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.quickstart.data import (
    IMAGE_SIZE,
    SCENES,
    SPLITS,
    Task,
    assemble,
    divide,
    load_digit_images,
    load_tiles,
    rotated,
    upright,
)

DIVISION_SEED = 0
VARIANTS = 4  # images that are composed for each source image
HALF = IMAGE_SIZE // 2
ORDERS = tuple(itertools.permutations(range(3)))
INKS = tuple(itertools.product((0.1, 0.9), repeat=3))
CLASS_NAMES = {
    "digit": tuple(str(digit) for digit in range(10)),
    "rotation": ("0", "90", "180", "270"),
    "scene": tuple(SCENES),
    "channels": (*("".join("rgb"[channel] for channel in order) for order in ORDERS), "grey"),
    "seam": ("none", "vertical", "horizontal"),
    "place": tuple(f"row{row}_column{column}" for row in range(3) for column in range(3)),
    "count": tuple(str(count) for count in range(5)),
    "ink": ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white"),
}
TASKS = tuple(CLASS_NAMES)


@functools.cache
def load_tasks() -> dict[str, Task]:
    """The eight tasks by name, made once in a process; their images are not to be changed."""
    rng = np.random.default_rng(DIVISION_SEED)
    digits, digit_labels = load_digit_images()
    tiles, tile_labels = load_tiles()
    digit_rows, tile_rows = divide(len(digits), rng), divide(len(tiles), rng)
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {name: {} for name in CLASS_NAMES}
    for split in SPLITS:
        some_digits, some_tiles = digits[digit_rows[split]], tiles[tile_rows[split]]
        pairs["digit"][split] = upright(some_digits), digit_labels[digit_rows[split]]
        pairs["rotation"][split] = rotated(some_digits, rng)
        pairs["scene"][split] = some_tiles, tile_labels[tile_rows[split]]
        pairs["channels"][split] = _reordered(some_tiles)
        pairs["seam"][split] = _joined(some_tiles, rng)
        pairs["place"][split] = _placed(some_digits, some_tiles, rng)
        pairs["count"][split] = _counted(some_digits, some_tiles, rng)
        pairs["ink"][split] = _inked(some_digits, some_tiles, rng)
    return {task.name: task for task in assemble(CLASS_NAMES, pairs)}


def _reordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Every tile once with each order of its channels, and once without colour."""
    grey = tiles.mean(dim=1, keepdim=True).expand_as(tiles)
    images = torch.cat([*(tiles[:, list(order)] for order in ORDERS), grey])
    return images, torch.arange(len(ORDERS) + 1).repeat_interleave(len(tiles))


def _joined(tiles: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Tiles of which a random part, on the right or below, was replaced by another tile's."""
    n = VARIANTS * len(tiles)
    images, others = _sample(tiles, n, rng), _sample(tiles, n, rng)
    seams = rng.integers(3, size=n)
    starts = rng.integers(4, IMAGE_SIZE - 3, size=n)
    for image, other, seam, start in zip(images, others, seams, starts, strict=True):
        if seam == 1:
            image[:, :, start:] = other[:, :, start:]
        elif seam == 2:
            image[:, start:] = other[:, start:]
    return images, torch.from_numpy(seams)


def _placed(digits: Tensor, tiles: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A digit, easy to see, at one of nine places of a tile."""
    digits = digits.repeat(VARIANTS, 1, 1, 1)
    images = _sample(tiles, len(digits), rng)
    places = rng.integers(9, size=len(digits))
    for image, digit, place in zip(images, digits, places, strict=True):
        _stick(image, digit, 4 * (place // 3), 4 * (place % 3), None, rng)
    return images, torch.from_numpy(places)


def _counted(digits: Tensor, tiles: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Tiles with none to four digits, easy to see, each in a quarter of its own."""
    n = VARIANTS * len(digits)
    images = _sample(tiles, n, rng)
    counts = rng.integers(5, size=n)
    for image, count in zip(images, counts, strict=True):
        for quarter in rng.permutation(4)[:count]:
            digit = digits[rng.integers(len(digits))]
            _stick(image, digit, HALF * (quarter // 2), HALF * (quarter % 2), None, rng)
    return images, torch.from_numpy(counts)


def _inked(digits: Tensor, tiles: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A digit anywhere on a tile, in one of eight colours that vary a little."""
    digits = digits.repeat(VARIANTS, 1, 1, 1)
    images = _sample(tiles, len(digits), rng)
    inks = rng.integers(len(INKS), size=len(digits))
    for image, digit, ink in zip(images, digits, inks, strict=True):
        top, left = rng.integers(HALF + 1, size=2)
        colour = np.clip(np.array(INKS[ink]) + rng.normal(0.0, 0.08, 3), 0.0, 1.0)
        _stick(image, digit, top, left, colour, rng)
    return images, torch.from_numpy(inks)


def _sample(tiles: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """``n`` tiles, drawn with replacement, as a copy."""
    return tiles[torch.from_numpy(rng.integers(len(tiles), size=n))]


def _stick(
    image: Tensor,
    digit: Tensor,
    top: int,
    left: int,
    colour: NDArray[np.float64] | None,
    rng: np.random.Generator,
) -> None:
    """Write ``digit`` into ``image``; without a colour, dark where it is light, and light where
    it is dark."""
    window = image[:, top : top + HALF, left : left + HALF]
    if colour is None:
        dark = rng.uniform(0.0, 0.25, 3)
        colour = dark if window.mean() > 0.5 else 1 - dark
    window += digit * (torch.from_numpy(colour).float()[:, None, None] - window)
