"""Augmentations, pure functions of a key and a batch, run inside a training step.

A batch is a dict of arrays whose first axis counts examples. Its pictures share height
and width:

* "image", "input", "target": (examples, height, width, channels), uint8 or float32;
* "mask": (examples, height, width), uint8 labels of pixels.

Geometric augmentations move all pictures of an example alike, so that image and mask,
or input and target, stay aligned. They keep the dtypes. Photometric ones change "image"
only, since in a pair they would change what is to be predicted. Other entries, such as
"label", are returned unchanged.

>>> import jax, jax.numpy as jnp
>>> from train.data import augment
>>> augmentation = augment.chain(
...     augment.pad_crop(4),
...     augment.random_flip(),
...     augment.normalize(mean=(0.5,), std=(0.25,)),
... )
>>> batch = {"image": jnp.zeros((2, 8, 8, 1), jnp.uint8), "label": jnp.arange(2)}
>>> jax.jit(augmentation)(jax.random.key(0), batch)["image"].dtype
dtype('float32')
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from train.data import boxes

Batch = dict[str, jax.Array]
Augmentation = Callable[[jax.Array, Batch], Batch]
Size = tuple[int, int]  # height, width
Range = tuple[float, float]

_IMAGES = ("image", "input", "target")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def chain(*augmentations: Augmentation) -> Augmentation:
    """Applies augmentations one after the other, each with its own key.

    >>> import jax, jax.numpy as jnp
    >>> flip_twice = chain(random_flip(1.0), random_flip(1.0))
    >>> batch = {"image": jnp.arange(3.0).reshape(1, 1, 3, 1)}
    >>> flip_twice(jax.random.key(0), batch)["image"].ravel().tolist()
    [0.0, 1.0, 2.0]
    """

    def augment(key: jax.Array, batch: Batch) -> Batch:
        keys = jax.random.split(key, len(augmentations))
        for augmentation, own_key in zip(augmentations, keys, strict=True):
            batch = augmentation(own_key, batch)
        return batch

    return augment


def pad_crop(padding: int = 4, *, ignore_label: int = 255) -> Augmentation:
    """Shifts pictures by up to `padding` pixels: pads all sides and crops at random.

    Args:
      padding: number of pixels added to each side, which are 0 in images.
      ignore_label: value of the pixels added to masks.

    Raises:
      ValueError: if an argument is not a whole number in its range.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.ones((2, 32, 32, 3), jnp.uint8)}
    >>> pad_crop(4)(jax.random.key(0), batch)["image"].shape
    (2, 32, 32, 3)
    """
    _check_whole("padding", padding, 0)
    _check_whole("ignore_label", ignore_label, 0, 255)

    def pad(picture: jax.Array, fill: int) -> jax.Array:
        sides = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
        return jnp.pad(picture, sides[: picture.ndim], constant_values=fill)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        size = _shape(batch)[1:]
        return random_crop(size)(key, _move(pad, batch, ignore_label))

    return augment


def random_crop(size: Size) -> Augmentation:
    """Crops pictures at a random place.

    Args:
      size: (height, width) of the crop in pixels.

    Raises:
      ValueError: if the size is not a pair of whole numbers above 0; and when called,
        if it exceeds the size of the pictures.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.arange(9).reshape(1, 1, 9, 1)}
    >>> image = random_crop((1, 3))(jax.random.key(0), batch)["image"].ravel()
    >>> (image - image[0]).tolist()
    [0, 1, 2]
    """
    _check_size(size)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        room = jnp.asarray(_room(batch, size)).reshape(1, 2)
        corners = jax.random.randint(key, (_shape(batch)[0], 2), 0, room + 1)

        def crop(picture: jax.Array, corner: jax.Array) -> jax.Array:
            rest = picture.shape[2:]
            start = (*corner, *(0 for _ in rest))
            return jax.lax.dynamic_slice(picture, start, (*size, *rest))

        return _move(lambda picture, fill: jax.vmap(crop)(picture, corners), batch)

    return augment


def center_crop(size: Size) -> Augmentation:
    """Crops pictures around their center, for evaluation.

    The key is ignored. An odd pixel is left over at the bottom and on the right.

    Args:
      size: (height, width) of the crop in pixels.

    Raises:
      ValueError: in the same cases as `random_crop`.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.arange(9).reshape(1, 1, 9, 1)}
    >>> center_crop((1, 3))(jax.random.key(0), batch)["image"].ravel().tolist()
    [3, 4, 5]
    """
    _check_size(size)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        del key
        top, left = (room // 2 for room in _room(batch, size))
        rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
        return _move(lambda picture, fill: picture[:, rows, columns], batch)

    return augment


def random_flip(probability: float = 0.5) -> Augmentation:
    """Exchanges left and right in the pictures of an example at random.

    Args:
      probability: probability that an example is flipped.

    Raises:
      ValueError: if the probability is not in [0, 1].

    >>> import jax, jax.numpy as jnp
    >>> batch = {"mask": jnp.arange(3).reshape(1, 1, 3)}
    >>> random_flip(1.0)(jax.random.key(0), batch)["mask"].ravel().tolist()
    [2, 1, 0]
    """
    _check("probability", probability, 0 <= probability <= 1, "from 0 to 1")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        flips = jax.random.bernoulli(key, float(probability), _shape(batch)[:1])

        def flip(picture: jax.Array, fill: int) -> jax.Array:
            chosen = flips.reshape(-1, *(1 for _ in picture.shape[1:]))
            return jnp.where(chosen, picture[:, :, ::-1], picture)

        return _move(flip, batch)

    return augment


def random_resized_crop(
    size: Size, *, scale: Range = boxes.SCALE, ratio: Range = boxes.RATIO
) -> Augmentation:
    """Cuts a box of random area and shape from pictures and resizes it.

    The box has a uniform share of the picture's area and a log-uniform ratio of width
    to height, and lies anywhere inside. Large boxes fit at some ratios only; their
    ratio is drawn from those, so that the area stays uniform. (If a box does not fit,
    torchvision draws area and ratio again, which makes large boxes rarer.) Images are
    resized bilinearly with antialiasing; masks take the nearest pixels to the same
    points.

    To keep all detail, the pictures should have the size in which they are stored. For
    pictures of different sizes, `train.data.dataset.RandomResizedCrop` cuts such boxes
    while they are decoded.

    Args:
      size: (height, width) of the result in pixels.
      scale: least and largest share of the picture's area.
      ratio: least and largest width / height of the box; where no box in this range has
        the area drawn, the nearest ratio that fits is taken.

    Raises:
      ValueError: if an argument is not in its range.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.zeros((2, 64, 48, 3), jnp.uint8)}
    >>> random_resized_crop((32, 32))(jax.random.key(0), batch)["image"].shape
    (2, 32, 32, 3)

    References:
      C. Szegedy et al., `Going Deeper with Convolutions
      <https://arxiv.org/abs/1409.4842>`_, 2015
    """
    _check_size(size)
    _check_range("scale", scale, highest=1)
    _check_range("ratio", ratio)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        examples, height, width = _shape(batch)
        *draw_keys, place_key = jax.random.split(key, 3)
        keys = iter(draw_keys)  # one for the area, one for the ratio

        def uniform(low: jax.Array | float, high: jax.Array | float) -> jax.Array:
            return jax.random.uniform(next(keys), (examples,), minval=low, maxval=high)

        sides = boxes.draw_sides(uniform, height, width, scale, ratio, jnp)
        return _resample_at_random(place_key, batch, jnp.stack(sides, axis=-1), size)

    return augment


def random_scale_crop(
    size: Size, *, scale: Range = (0.5, 2.0), ignore_label: int = 255
) -> Augmentation:
    """Resizes pictures by a random factor and crops them at random.

    This is the usual augmentation for segmentation. The factor is uniform and the same
    for height and width. A picture that becomes smaller than the crop lies anywhere in
    it, with 0 around images. Images are resized bilinearly with antialiasing; masks
    take the nearest pixels to the same points.

    Args:
      size: (height, width) of the crop in pixels.
      scale: least and largest factor.
      ignore_label: value around masks.

    Raises:
      ValueError: if an argument is not in its range.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"mask": jnp.ones((1, 4, 4), jnp.uint8)}
    >>> shrink = random_scale_crop((1, 4), scale=(0.5, 0.5))
    >>> sorted(shrink(jax.random.key(0), batch)["mask"].ravel().tolist())
    [1, 1, 255, 255]

    References:
      H. Zhao et al., `Pyramid Scene Parsing Network
      <https://arxiv.org/abs/1612.01105>`_, 2017
    """
    _check_size(size)
    _check_range("scale", scale)
    _check_whole("ignore_label", ignore_label, 0, 255)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        factor_key, place_key = jax.random.split(key)
        factors = jax.random.uniform(
            factor_key, (_shape(batch)[0], 1), minval=scale[0], maxval=scale[1]
        )
        sides = jnp.asarray(size).reshape(1, 2) / factors
        return _resample_at_random(place_key, batch, sides, size, ignore_label)

    return augment


def color_jitter(
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> Augmentation:
    """Changes brightness, contrast, saturation and hue of images, in this order.

    Brightness, contrast and saturation each multiply a difference by a random factor:
    the difference from black, from the mean gray of the image, and from the gray of
    each pixel. A strength of x draws the factor uniformly from max(0, 1 - x) to 1 + x.
    Results are clipped to [0, 255]. torchvision does the same in a random order. Images
    are RGB from 0 to 255. On images of one channel, saturation and hue do nothing.

    Args:
      brightness: strength, at least 0.
      contrast: strength, at least 0.
      saturation: strength, at least 0.
      hue: largest rotation in either direction, as a fraction of the color circle, from
        0 to 0.5.

    Returns:
      An augmentation that makes "image" float32 from 0 to 255.

    Raises:
      ValueError: if an argument is not in its range; and when called, if images have
        neither one nor three channels.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.full((1, 1, 1, 3), 100, jnp.uint8)}
    >>> image = color_jitter(brightness=0.1)(jax.random.key(0), batch)["image"]
    >>> bool(jnp.all((90 <= image) & (image <= 110)))
    True
    """
    strengths = {"brightness": brightness, "contrast": contrast}
    for name, value in (strengths | {"saturation": saturation}).items():
        _check(name, value, 0 <= value < math.inf, "a finite number of at least 0")
    _check("hue", hue, 0 <= hue <= 0.5, "from 0 to 0.5")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        image = _image(batch, channels=(1, 3)).astype(jnp.float32)
        keys = jax.random.split(key, 4)

        image = _stretch(keys[0], image, jnp.zeros_like(image), brightness)
        mean_gray = _gray(image).mean((1, 2, 3), keepdims=True)
        image = _stretch(keys[1], image, mean_gray, contrast)
        if image.shape[-1] == 3:
            image = _stretch(keys[2], image, _gray(image), saturation)
            if hue > 0:  # it costs most, and rounds even where it changes nothing
                image = _turn_hue(keys[3], image, hue)
        return batch | {"image": image}

    return augment


def cutout(size: int) -> Augmentation:
    """Sets a square of images to 0, centered on a random pixel.

    The part beyond the border is lost. In the paper, 0 is the mean color: put `cutout`
    after `normalize`, since before it 0 is black.

    Args:
      size: side of the square in pixels.

    Raises:
      ValueError: if the size is not a whole number above 0.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.ones((1, 1, 5, 1))}
    >>> sorted(cutout(1)(jax.random.key(0), batch)["image"].ravel().tolist())
    [0.0, 1.0, 1.0, 1.0, 1.0]

    References:
      T. DeVries, G. Taylor, `Improved Regularization of Convolutional Neural Networks
      with Cutout <https://arxiv.org/abs/1708.04552>`_, 2017
    """
    _check_whole("size", size, 1)

    def hit(key: jax.Array, examples: int, length: int) -> jax.Array:
        first = jax.random.randint(key, (examples, 1), 0, length) - size // 2
        offset = jnp.arange(length).reshape(1, length) - first
        return (offset >= 0) & (offset < size)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        image = _image(batch)
        examples, height, width, _ = image.shape
        row_key, column_key = jax.random.split(key)
        rows = hit(row_key, examples, height).reshape(examples, height, 1, 1)
        columns = hit(column_key, examples, width).reshape(examples, 1, width, 1)
        return batch | {"image": jnp.where(rows & columns, 0, image)}

    return augment


def normalize(mean: Sequence[float], std: Sequence[float]) -> Augmentation:
    """Makes images float32, (image / 255 - mean) / std; the key is ignored.

    Args:
      mean: mean of each channel of images scaled to [0, 1].
      std: standard deviation of each channel, likewise, above 0.

    Raises:
      ValueError: if an argument is not in its range or their lengths differ; and when
        called, if images have another number of channels.

    >>> import jax, jax.numpy as jnp
    >>> batch = {"image": jnp.full((1, 1, 1, 1), 255, jnp.uint8)}
    >>> normalize(mean=(0.5,), std=(0.25,))(jax.random.key(0), batch)["image"].item()
    2.0
    """
    _check("mean", mean, all(0 <= m <= 1 for m in mean), "from 0 to 1 per channel")
    _check("std", std, all(0 < s <= 1 for s in std), "above 0 and up to 1 per channel")
    _check("std", std, len(std) == len(mean), f"as long as mean, {len(mean)}")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        del key
        image = _image(batch, channels=(len(mean),))
        offset, factor = (
            jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std)
        )
        return batch | {"image": (image.astype(jnp.float32) / 255 - offset) / factor}

    return augment


def _shape(batch: Batch) -> tuple[int, int, int]:
    """Returns the (examples, height, width) of all pictures of a batch."""
    dims = dict.fromkeys(_IMAGES, 4) | {"mask": 3}
    shapes = {name: batch[name].shape for name in dims if name in batch}
    if len({shape[:3] for shape in shapes.values()}) != 1 or any(
        len(shape) != dims[name] for name, shape in shapes.items()
    ):
        raise ValueError(
            "a batch needs 'image', 'input' or 'target' of shape (examples, height, "
            "width, channels) or 'mask' of (examples, height, width), all alike in the "
            f"first three; got {shapes or list(batch)}"
        )
    examples, height, width = next(iter(shapes.values()))[:3]
    return examples, height, width


def _image(
    batch: Batch, channels: Sequence[int] = ()
) -> Num[jax.Array, "examples height width channels"]:
    shape = batch["image"].shape if "image" in batch else ()
    if len(shape) != 4 or (channels and shape[-1] not in channels):
        wanted = " or ".join(map(str, channels)) or "any"
        raise ValueError(
            "a photometric augmentation needs 'image' of shape (examples, height, "
            f"width, channels) with {wanted} channels, got {shape or list(batch)}"
        )
    return batch["image"]


def _move(
    move: Callable[[jax.Array, int], jax.Array], batch: Batch, ignore_label: int = 255
) -> Batch:
    """Applies a function (picture, fill value) -> picture to all pictures."""
    fills = dict.fromkeys(_IMAGES, 0) | {"mask": ignore_label}
    return batch | {k: move(batch[k], v) for k, v in fills.items() if k in batch}


def _room(batch: Batch, size: Size) -> Size:
    """Returns how far a crop can move down and to the right."""
    _, height, width = _shape(batch)
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"a crop of {size[0]}x{size[1]} does not fit pictures of {height}x{width}: "
            "crop less, or load larger pictures"
        )
    return height - size[0], width - size[1]


def _resample_at_random(
    key: jax.Array,
    batch: Batch,
    sides: Float[jax.Array, "examples 2"],
    size: Size,
    ignore_label: int = 255,
) -> Batch:
    """Places a box at random in the pictures of each example, and resamples it.

    Along an axis where the box is shorter than the picture, it lies inside; where it is
    longer, it contains the picture.

    Args:
      key: decides the places.
      batch: the pictures.
      sides: (height, width) of the boxes in pixels, float32 (examples, 2).
      size: (height, width) of the result.
      ignore_label: value of masks outside the picture.
    """
    room = jnp.asarray(_shape(batch)[1:]).reshape(1, 2) - sides
    corners = room * jax.random.uniform(key, sides.shape)

    def move(picture: jax.Array, fill: int) -> jax.Array:
        resample = functools.partial(_resample, size=size, fill=fill)
        return jax.vmap(resample)(picture, corners, sides)

    return _move(move, batch, ignore_label)


def _resample(
    picture: Num[jax.Array, "height width *channels"],
    corner: Float[jax.Array, "2"],
    sides: Float[jax.Array, "2"],
    *,
    size: Size,
    fill: int,
) -> Num[jax.Array, "new_height new_width *channels"]:
    """Resizes a box of a picture, with `fill` where it reaches outside the picture.

    Args:
      picture: image (height, width, channels) or mask (height, width).
      corner: (top, left) of the box in pixels; pixel i reaches from i to i + 1.
      sides: (height, width) of the box in pixels.
      size: (height, width) of the result.
      fill: value outside the picture.
    """
    # Centers of the new pixels in the coordinates of the picture.
    rows, columns = (
        corner[i] + sides[i] / size[i] * (jnp.arange(size[i]) + 0.5) for i in range(2)
    )
    inside = ((rows >= 0) & (rows < picture.shape[0])).reshape(-1, 1)
    inside &= ((columns >= 0) & (columns < picture.shape[1])).reshape(1, -1)
    if picture.ndim == 2:
        nearest = rows.astype(jnp.int32)[:, None], columns.astype(jnp.int32)[None, :]
        return jnp.where(inside, picture[nearest], fill)
    zoom = jnp.asarray(size) / sides
    resized = jax.image.scale_and_translate(
        picture.astype(jnp.float32),
        (*size, picture.shape[-1]),
        spatial_dims=(0, 1),
        scale=zoom,
        translation=-corner * zoom,
        method="linear",
    )
    # Weighted means stay in the range of the picture, so rounding suffices.
    if jnp.issubdtype(picture.dtype, jnp.integer):
        resized = jnp.round(resized)
    return jnp.where(inside[:, :, None], resized, fill).astype(picture.dtype)


def _stretch(
    key: jax.Array, image: jax.Array, origin: jax.Array, strength: float
) -> jax.Array:
    """Multiplies the difference from an origin by a random factor around 1."""
    shape = (len(image), 1, 1, 1)
    low, high = max(0, 1 - strength), 1 + strength
    factor = jax.random.uniform(key, shape, minval=low, maxval=high)
    return jnp.clip(factor * image + (1 - factor) * origin, 0, 255)


def _gray(
    image: Num[jax.Array, "examples height width channels"],
) -> Num[jax.Array, "examples height width 1"]:
    """Returns the perceived brightness, in one channel."""
    if image.shape[-1] == 1:
        return image
    luma = jnp.asarray(_LUMA, image.dtype).reshape(1, 1, 1, 3)
    return (image * luma).sum(-1, keepdims=True)


def _turn_hue(
    key: jax.Array, image: Float[jax.Array, "examples height width 3"], limit: float
) -> Float[jax.Array, "examples height width 3"]:
    """Rotates the hue at random; keeps the largest and least channel values."""
    turn = jax.random.uniform(key, (len(image), 1, 1), minval=-limit, maxval=limit)
    red, green, blue = jnp.moveaxis(image, -1, 0)
    value = image.max(-1)
    chroma = value - image.min(-1)
    safe = jnp.where(chroma > 0, chroma, 1)  # the hue of gray does not matter
    # The hue in sixths of the circle from red; the largest channel decides the third.
    hue = jnp.select(
        [value == red, value == green],
        [(green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    )
    hue += 6 * turn

    def channel(peak: int) -> jax.Array:
        # A channel is full within one sixth of its own hue and zero beyond two.
        offset = hue - peak + 3
        distance = jnp.abs(offset - 6 * jnp.floor(offset / 6) - 3)  # % is slow
        return value - chroma * jnp.clip(distance - 1, 0, 1)

    return jnp.stack([channel(peak) for peak in (0, 2, 4)], axis=-1)


def _check(argument: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{argument} must be {expected}, got {value!r}")


def _check_whole(argument: str, value: int, low: int, high: float = math.inf) -> None:
    valid = isinstance(value, numbers.Integral) and low <= value <= high
    expected = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    _check(argument, value, valid, f"a whole number {expected}")


def _check_size(size: Size) -> None:
    pair = isinstance(size, Sequence) and len(size) == 2
    valid = pair and all(isinstance(n, numbers.Integral) and n > 0 for n in size)
    _check("size", size, valid, "(height, width), whole numbers above 0")


def _check_range(argument: str, bounds: Range, highest: float = math.inf) -> None:
    pair = isinstance(bounds, Sequence) and len(bounds) == 2
    valid = pair and 0 < bounds[0] <= bounds[1] <= highest and bounds[1] < math.inf
    limit = "" if highest == math.inf else f" and at most {highest}"
    _check(argument, bounds, valid, f"(low, high), low <= high, both above 0{limit}")
