"""Four image tasks made from the real images that scikit-learn carries; nothing is downloaded.

* ``digit``: which handwritten digit it is (white on black);
* ``rotation``: by how many quarter turns a digit was rotated (ink on tinted paper);
* ``scene``: what a tile of a photograph shows (sky, water, temple, trees, petals, leaves);
* ``place``: where on a tile of a photograph a small digit was stuck.

The *source* images (digits, non-overlapping tiles) are divided into splits before anything is
derived from them: an image of the test split is never seen, in any form and for any task, while
training or choosing parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

IMAGE_SIZE = 16
SPLITS = {"pretrain": 0.15, "train": 0.50, "validation": 0.12, "test": 0.23}
TILE = 16
# Labelled by hand: rectangles (left, top, right, bottom) in pixels of one photograph each, each
# of which shows one thing only.
SCENES: dict[str, tuple[str, tuple[tuple[int, int, int, int], ...]]] = {
    "sky": (
        "china.jpg",
        ((0, 0, 176, 64), (240, 0, 640, 64), (0, 64, 80, 144), (336, 64, 576, 192)),
    ),
    "water": ("china.jpg", ((368, 240, 544, 304),)),
    "temple": ("china.jpg", ((128, 144, 304, 336), (192, 96, 272, 144), (256, 336, 336, 384))),
    "trees": ("china.jpg", ((0, 352, 176, 427), (352, 368, 640, 427), (432, 304, 640, 368))),
    "petals": ("flower.jpg", ((208, 144, 400, 304), (240, 112, 368, 144), (256, 304, 368, 336))),
    "leaves": ("flower.jpg", ((0, 0, 160, 427), (480, 0, 640, 427), (176, 0, 464, 64))),
}


@dataclass(frozen=True)
class Split:
    """Images ``(n, 3, 16, 16)`` in [-1, 1] and labels that count over all tasks' classes."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """One task: its classes occupy ``classes`` among the outputs of the shared classifier."""

    name: str
    class_names: tuple[str, ...]
    offset: int
    splits: Mapping[str, Split]

    @property
    def classes(self) -> slice:
        return slice(self.offset, self.offset + len(self.class_names))


def load_tasks(seed: int) -> tuple[Task, ...]:
    """The four tasks; ``seed`` decides the division into splits and how images are composed."""
    rng = np.random.default_rng(seed)
    digits, digit_labels = load_digit_images()
    tiles, tile_labels = load_tiles()
    digit_rows, tile_rows = divide(len(digits), rng), divide(len(tiles), rng)
    class_names = {
        "digit": tuple(str(digit) for digit in range(10)),
        "rotation": ("0", "90", "180", "270"),
        "scene": tuple(SCENES),
        "place": tuple(f"row{row}_column{column}" for row in range(3) for column in range(3)),
    }
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {name: {} for name in class_names}
    for split in SPLITS:
        some_digits, some_tiles = digits[digit_rows[split]], tiles[tile_rows[split]]
        pairs["digit"][split] = upright(some_digits), digit_labels[digit_rows[split]]
        pairs["rotation"][split] = rotated(some_digits, rng)
        pairs["scene"][split] = some_tiles, tile_labels[tile_rows[split]]
        pairs["place"][split] = _placed(some_digits, some_tiles, rng)
    return assemble(class_names, pairs)


def assemble(
    class_names: Mapping[str, tuple[str, ...]],
    pairs: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
) -> tuple[Task, ...]:
    """Tasks from images in [0, 1] and labels from 0, by task and split; classes are numbered on."""
    tasks, offset = [], 0
    for name, names in class_names.items():
        splits = {k: Split(x * 2 - 1, y + offset) for k, (x, y) in pairs[name].items()}
        tasks.append(Task(name, names, offset, splits))
        offset += len(names)
    return tuple(tasks)


def divide(n: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Disjoint random index sets with the proportions of ``SPLITS``."""
    ends = np.round(np.cumsum(list(SPLITS.values())) * n).astype(int)
    parts = np.split(rng.permutation(n), ends[:-1])
    return {name: torch.from_numpy(part) for name, part in zip(SPLITS, parts, strict=True)}


def load_digit_images() -> tuple[Tensor, Tensor]:
    """All handwritten digits, ``(n, 1, 8, 8)`` in [0, 1], and which digit each is."""
    data = load_digits()
    return torch.from_numpy(data.images).float().div(16)[:, None], torch.from_numpy(data.target)


def load_tiles() -> tuple[Tensor, Tensor]:
    """Non-overlapping square tiles of the rectangles in ``SCENES``, and what they show."""
    data = load_sample_images()
    names = (Path(name).name for name in data.filenames)
    photos = dict(zip(names, data.images, strict=True))
    tiles, labels = [], []
    for label, (photo, rectangles) in enumerate(SCENES.values()):
        image = torch.from_numpy(np.array(photos[photo])).permute(2, 0, 1).float().div(255)
        for left, top, right, bottom in rectangles:
            for y in range(top, bottom - TILE + 1, TILE):
                for x in range(left, right - TILE + 1, TILE):
                    tiles.append(image[:, y : y + TILE, x : x + TILE])
                    labels.append(label)
    return torch.stack(tiles), torch.tensor(labels)


def upright(digits: Tensor) -> Tensor:
    large = F.interpolate(digits, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return large.repeat(1, 3, 1, 1)


def rotated(digits: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Every digit four times, turned by 0, 90, 180, 270 degrees, dark on a light tint."""
    ink = upright(digits)
    turned = torch.cat([torch.rot90(ink, turns, dims=(2, 3)) for turns in range(4)])
    paper = torch.from_numpy(rng.uniform(0.6, 1.0, (len(turned), 3, 1, 1))).float()
    return paper * (1 - turned), torch.arange(4).repeat_interleave(len(digits))


def _placed(digits: Tensor, tiles: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Every digit four times at one of nine places of a random tile, in a random colour."""
    digits = digits.repeat(4, 1, 1, 1)
    images = tiles[torch.from_numpy(rng.integers(len(tiles), size=len(digits)))].clone()
    colours = torch.from_numpy(rng.uniform(0.0, 1.0, (len(digits), 3, 1, 1))).float()
    places = rng.integers(9, size=len(digits))
    for image, digit, colour, place in zip(images, digits, colours, places, strict=True):
        top, left = 4 * (place // 3), 4 * (place % 3)
        window = image[:, top : top + 8, left : left + 8]
        window += digit * (colour - window)
    return images, torch.from_numpy(places)
