"""Width and height of a video: what was asked for, what a picture or a pose video makes of it, what a model takes.

With a picture the size asked for is an area, and each task fits the picture's shape into it by a rule of its own.  Pure
functions, no torch.
"""

from __future__ import annotations

import math

from wanloom.errors import InputError
from wanloom.request import MAX_SIDE, Request, Size, parse_size
from wanloom.variants import Variant

GRID = 1024  # positions per axis of the model's rotation table (official rope_params(1024, ...))
SIZE_STEP = 64  # sizes of s2v are multiples of this
SCALES = 100  # tried for s2v between the largest and the smallest


def image_area_size(image: Size, area: int, stride: int = 8, patch: int = 2) -> Size:
    """Width and height of an i2v video: multiples of stride * patch, at most `area` pixels, about the picture's aspect.

    The official rule with its floating-point floor (wan/image2video.py): 832x480 pictures at that area give 832x464.
    """
    width, height = image
    aspect = height / width
    rows = int(math.sqrt(area * aspect) // stride // patch * patch)
    columns = int(math.sqrt(area / aspect) // stride // patch * patch)
    return columns * stride, rows * stride


def best_area_size(image: Size, area: int, multiple: int) -> Size:
    """Width and height of a ti2v video with a picture: the better of rounding width first or height first.

    The official rule (wan/utils/utils.py, best_output_size); (0, 0) when nothing fits the area.
    """
    width, height = image
    ratio = width / height
    wide = math.sqrt(area * ratio)
    high = area / wide
    candidates = []
    columns = int(wide // multiple * multiple)
    if columns:
        candidates.append((columns, int(area / columns // multiple * multiple)))
    rows = int(high // multiple * multiple)
    if rows:
        candidates.append((int(area / rows // multiple * multiple), rows))

    def error(size: Size) -> float:
        made = size[0] / size[1]
        return max(ratio / made, made / ratio)

    fitting = [size for size in candidates if min(size) > 0]
    if not fitting:
        return 0, 0
    # Of two equal ones the second wins: the official comparison is strict.
    return min(reversed(fitting), key=error)


def speech_size(picture: Size, area: int) -> Size:
    """Width and height of an s2v video: the picture's shape in multiples of 64, at most `area` pixels, never larger.

    The official scan (wan/speech2video.py, get_size_less_than_area): a hundred scales from the largest down, the first
    whose sides, rounded up, fit.  (0, 0) when none does.
    """
    width, height = picture
    if area < SIZE_STEP**2:
        return 0, 0
    largest, smallest = _scales(width, height, area)
    for i in range(SCALES):
        scale = largest - (largest - smallest) * i / (SCALES - 1)
        sides = [-(-int(side * scale) // SIZE_STEP) * SIZE_STEP for side in (width, height)]
        if sides[0] * sides[1] <= area and min(sides) > 0:
            return sides[0], sides[1]
    return 0, 0


def _scales(width: int, height: int, area: int) -> tuple[float, float]:
    """The largest and the smallest scale that are tried."""
    if width * height <= area:
        return 1.0, 0.1
    largest = math.sqrt(area / (width * height))
    # where even sides padded by 63 fit; the reference has b^2 - 2ac under the root, and so have we
    a, b, c = width * height, (SIZE_STEP - 1) * (width + height), (SIZE_STEP - 1) ** 2 - area
    smallest = (-b + math.sqrt(b * b - 2 * a * c)) / (2 * a)
    return largest, smallest


def latent_shape(variant: Variant, size: Size, frames: int) -> tuple[int, int, int, int]:
    """(C, T, h, w) of a video of this size (w, h) and frame count."""
    time, down, right = variant.vae.stride
    return variant.vae.z, (frames - 1) // time + 1, size[1] // down, size[0] // right


def _driven_size(request: Request, variant: Variant, driver: Size | None) -> tuple[Size, Size]:
    """animate makes the size of its pose video."""
    size = driver or (asked_size(request, variant))
    multiple = variant.multiple
    if request.size is not None and asked_size(request, variant) != size:
        raise InputError("E2003", f"size: {variant.name} makes the size of the pose video, {size[0]}x{size[1]}.")
    if size[0] % multiple or size[1] % multiple:
        near = _nearest(size, multiple)
        raise InputError(
            "E3019",
            f"pose-video: {size[0]}x{size[1]}, expected sides in multiples of {multiple}: {near[0]}x{near[1]}. "
            "`wanloom preprocess animate` makes such videos.",
        )
    return size, size


def decide_sizes(request: Request, variant: Variant, image: Size | None) -> tuple[Size, Size]:
    """The size named, and the size made: with a picture (or a pose video, `image`) only the area of the first one."""
    asked = asked_size(request, variant)
    multiple = variant.multiple
    size = asked
    if variant.conditioner == "animate":
        return _driven_size(request, variant, image)
    if image is not None and variant.conditioner != "text":
        check_sides(image, "image", "E3007")
        area = asked[0] * asked[1]
        if variant.conditioner == "speech":
            size = speech_size(image, area)
        elif variant.conditioner == "image":
            size = image_area_size(image, area, variant.vae.stride[1], variant.dit.patch[1])
        else:
            size = best_area_size(image, area, multiple)
        if min(size) <= 0:
            raise InputError(
                "E2004",
                f"size: a picture of {image[0]}x{image[1]} does not fit the area of {asked[0]}x{asked[1]} in multiples "
                f"of {multiple}. Use a larger size, or a picture less narrow.",
            )
    for side in size:
        if side // multiple > GRID:
            raise InputError(
                "E2004",
                f"size: {size[0]}x{size[1]} is above the {GRID} positions per axis of {variant.name}: "
                f"at most {GRID * multiple} pixels a side. Published sizes: {listed(variant)}.",
            )
    return asked, size


def asked_size(request: Request, variant: Variant) -> Size:
    size = request.size
    if size is None:
        return variant.defaults.size
    if isinstance(size, str):
        size = parse_size(size)
    width, height = check_sides(size, "size", "E2003")
    multiple = variant.multiple
    if width % multiple or height % multiple:
        near = _nearest((width, height), multiple)
        raise InputError(
            "E2003",
            f"size: got {width}x{height}, expected WIDTHxHEIGHT in multiples of {multiple}. Use {near[0]}x{near[1]}.",
        )
    return width, height


def check_sides(size: object, name: str, code: str) -> Size:
    if not (isinstance(size, tuple | list) and len(size) == 2 and all(type(side) is int for side in size)):
        raise InputError(code, f"{name}: got {size!r}, expected width and height in pixels.")
    width, height = size
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise InputError(code, f"{name}: got {width}x{height}, expected sides of 1 to {MAX_SIDE} pixels.")
    return width, height


def _nearest(size: Size, multiple: int) -> Size:
    width, height = (max(multiple, round(side / multiple) * multiple) for side in size)
    return width, height


def listed(variant: Variant) -> str:
    return ", ".join(f"{width}x{height}" for width, height in variant.sizes)
