# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiles of images: photographs of scikit-learn and scikit-image, image folders and datasets on the Hub."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

# The id of the token before the first byte. Smaller ids are bytes.
BEGIN_ID = 256
# Color photographs in the wheel of scikit-image. The functions of `skimage.data` may download others.
SKIMAGE_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
# From this number of images on, whole images are held out, otherwise a strip of each.
MIN_IMAGES_TO_HOLD_OUT = 20
# A horizontal flip and the position of a crop are drawn from `[seed, epoch, index]`, independent of the order.
_FLIP = 0.5


@dataclass
class Tiles:
    """
    Images to train on, and held-out tiles.

    Attributes:
        train: Images or parts of images `[height, width, 3]` (`uint8`), at least as large as a tile.
        held_out: Tiles `[num_tiles, size, size, 3]` (`uint8`) that overlap neither `train` nor each other.
        description, held_out_description: The data in words, for model cards.
        dataset_id: Name of the dataset on the Hub.
    """

    train: list[np.ndarray]
    held_out: np.ndarray
    description: str
    held_out_description: str
    dataset_id: str | None = None

    @property
    def size(self) -> int:
        """Height and width of a tile in pixels."""
        return self.held_out.shape[1]

    @property
    def num_train_pixels(self) -> int:
        """Number of pixels of all training images."""
        return sum(image.shape[0] * image.shape[1] for image in self.train)


@dataclass
class ImageArguments:
    """The data. See `load_tiles`."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Image folder, or dataset of images on the Hub. Default: photographs that scikit-learn and "
            "scikit-image ship."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    image_column: str = field(default="image", metadata={"help": "Image column of the dataset."})
    tile_size: int = field(default=64, metadata={"help": "Height and width of a tile in pixels."})
    validation_fraction: float = field(default=0.125, metadata={"help": "Fraction of the pixels to hold out."})
    max_held_out_tiles: int = field(default=48, metadata={"help": "Maximum number of held-out tiles."})
    num_crops: int = field(default=4000, metadata={"help": "Random crops of the training images in one epoch."})


class RandomCrops(Dataset):
    """
    Random crops of images, half of them flipped horizontally, as examples for a causal model.

    Images are drawn in proportion to the number of positions that a crop can have. A crop depends only on the seed,
    the epoch and its index, so that a resumed run sees the same crops as an uninterrupted one.

    Args:
        images: Images `[height, width, 3]` (`uint8`), at least as large as a crop.
        size: Height and width of a crop in pixels.
        num_crops: Number of crops in one epoch.
        seed: Seed of the crops.
        encode: Turns a crop into an example.
    """

    def __init__(
        self,
        images: list[np.ndarray],
        size: int,
        num_crops: int,
        seed: int,
        encode: Callable[[np.ndarray], dict[str, Tensor]],
    ):
        self.images, self.size, self.num_crops, self.seed, self.encode = images, size, num_crops, seed, encode
        self.epoch = 0
        positions = np.array([math.prod(side - size + 1 for side in image.shape[:2]) for image in images])
        self._shares = positions / positions.sum()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. `Trainer` calls this before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_crops

    def crop(self, index: int) -> np.ndarray:
        """Return a crop `[size, size, 3]`."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image = self.images[rng.choice(len(self.images), p=self._shares)]
        top, left = (rng.integers(side - self.size + 1) for side in image.shape[:2])
        crop = image[top : top + self.size, left : left + self.size]
        return crop[:, ::-1] if rng.random() < _FLIP else crop

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_crops:
            raise IndexError(index)
        return self.encode(self.crop(index))


def encode_tile(tile: np.ndarray) -> dict[str, Tensor]:
    """
    Encode a tile so that position `i` predicts its byte `i` in raster order.

    Args:
        tile: `[size, size, 3]` (`uint8`).

    Returns:
        `shift_labels` `[size * size * 3]`, the bytes in the order of rows, columns and color channels, and
        `input_ids` of the same length, `BEGIN_ID` followed by all bytes except the last. No token stands for the last
        byte, so position ids are the coordinates of the predicted byte.
    """
    labels = torch.from_numpy(np.ascontiguousarray(tile)).flatten().long()
    return {"input_ids": torch.cat([torch.tensor([BEGIN_ID]), labels[:-1]]), "shift_labels": labels}


def grid_tiles(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an image `[height, width, 3]` into adjacent tiles `[size, size, 3]`, without the rest on the lower right."""
    rows, columns = (range(0, side - size + 1, size) for side in image.shape[:2])
    return [image[row : row + size, column : column + size] for row in rows for column in columns]


def load_tiles(args: ImageArguments) -> Tiles:
    """
    Load images and hold out tiles.

    A split `validation` or `test` of the data is held out as a whole. Otherwise, of 20 images or more, whole images
    are held out, evenly spaced; of fewer images, a strip on the right of each. Held-out tiles are adjacent and never
    overlap the images to train on. If there are more than `max_held_out_tiles`, they are chosen evenly spaced.

    Raises:
        ValueError: If the data do not exist, contain no image that is large enough, or if an argument is out of range.
    """
    if not 0 < args.validation_fraction < 1:
        raise ValueError(f"`validation_fraction` is {args.validation_fraction}, but must be between 0 and 1.")
    for name in ("tile_size", "max_held_out_tiles", "num_crops"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}, but must be at least 1.")
    size = args.tile_size
    if args.data is None:
        photographs = load_photographs()
        splits = {"train": list(photographs.values())}
        names = ", ".join(f"`{name}`" for name in photographs)
        description = f"photographs that scikit-learn and scikit-image ship ({names})"
    else:
        splits = _load_dataset(args.data, args.dataset_config, args.image_column)
        is_folder = Path(args.data).is_dir()
        description = f"the image folder `{Path(args.data).resolve().name}`" if is_folder else f"`{args.data}`"
    large = {name: [image for image in images if min(image.shape[:2]) >= size] for name, images in splits.items()}
    for name, images in splits.items():
        if len(images) > len(large[name]):
            logger.warning(
                "%d images of the split `%s` are smaller than a tile of %d pixels.",
                len(images) - len(large[name]),
                name,
                size,
            )
    train, held_out, held_out_description = _hold_out(large, size, args.validation_fraction)
    tiles = [tile for image in held_out for tile in grid_tiles(image, size)]
    if not train or not tiles:
        raise ValueError(
            f"The data {args.data!r} have {len(train)} images to train on and {len(tiles)} held-out tiles of {size} × "
            f"{size} pixels: give more or larger images, or lower `tile_size`."
        )
    chosen = np.linspace(0, len(tiles) - 1, min(len(tiles), args.max_held_out_tiles)).round().astype(int)
    dataset_id = None if args.data is None or Path(args.data).exists() else args.data
    return Tiles(train, np.stack([tiles[i] for i in chosen]), description, held_out_description, dataset_id)


def load_photographs() -> dict[str, np.ndarray]:
    """
    Load the color photographs in the wheels of scikit-learn and scikit-image, by name. Nothing is downloaded.

    Raises:
        ValueError: If these packages are not installed.
    """
    try:
        import skimage
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ValueError(
            f"The default photographs need scikit-learn and scikit-image ({error}): run `pip install "
            "'reformer-hf[images]'`, or give `data`."
        ) from error
    samples = load_sample_images()
    photographs = dict(zip(samples.filenames, map(np.asarray, samples.images), strict=True))
    photographs = {Path(name).name: image for name, image in photographs.items()}
    folder = Path(skimage.__file__).parent / "data"
    for name in SKIMAGE_PHOTOGRAPHS:
        with Image.open(folder / name) as image:
            photographs[name] = np.asarray(image.convert("RGB"))
    return photographs


def _load_dataset(data: str, dataset_config: str | None, column: str) -> dict[str, list[np.ndarray]]:
    """Return the images of the split `train` and, if there is one, of the split `validation` or `test`."""
    try:
        if Path(data).is_dir():
            splits = datasets.load_dataset("imagefolder", data_dir=data)
        else:
            splits = datasets.load_dataset(data, dataset_config)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"The data {data!r} are no folder with images, and could not be loaded as a dataset from the Hub: {error}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"The data {data!r} have no split `train`, only {sorted(splits)}: choose other data.")
    if not isinstance(splits["train"].features.get(column), datasets.Image):
        raise ValueError(
            f"The data {data!r} have no images in a column {column!r}: set `image_column` to one of "
            f"{splits['train'].column_names}."
        )
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    chosen = {name: splits[name] for name in ("train", held_out) if name}
    return {name: [np.asarray(image.convert("RGB")) for image in split[column]] for name, split in chosen.items()}


def _hold_out(
    splits: dict[str, list[np.ndarray]], size: int, fraction: float
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Return the images to train on, the held-out images, and how they were held out."""
    train = splits["train"]
    for name in splits.keys() - {"train"}:
        return train, splits[name], f"the split `{name}`"
    if len(train) >= MIN_IMAGES_TO_HOLD_OUT:
        held_out = set(np.linspace(0, len(train) - 1, max(round(len(train) * fraction), 1)).round().astype(int))
        return (
            [image for i, image in enumerate(train) if i not in held_out],
            [image for i, image in enumerate(train) if i in held_out],
            f"{len(held_out)} of the images",
        )
    # Strips are as wide as whole tiles, and leave at least one tile to train on.
    parts = []
    for image in train:
        width = size * max(round(image.shape[1] * fraction / size), 1)
        if image.shape[1] - width >= size:
            parts.append((image[:, :-width], image[:, -width:]))
    left, right = ([part[side] for part in parts] for side in (0, 1))
    return left, right, f"a strip on the right of each image (about {fraction:.1%} of it)"
