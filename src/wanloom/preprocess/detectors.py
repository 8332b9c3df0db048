"""The two published ONNX networks: where a person is (YOLOv10m), and the 133 points of that person (ViTPose-H).

Only this module knows onnxruntime, which is imported when a network is loaded.  Frames are batched where a network
takes batches.  Networks are given red first, as they were trained; `swapped=True` gives them blue first, as the
official preprocessing does by mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wanloom.errors import InputError
from wanloom.media import Frames
from wanloom.preprocess.crops import sample
from wanloom.preprocess.keypoints import COUNT, Points

Floats = NDArray[np.float32]

BATCH = 8  # frames at once
REPOSITORY = "Wan-AI/Wan2.2-Animate-14B"
FOLDER = "process_checkpoint"
DETECTOR = "det/yolov10m.onnx"
POSE = "pose2d/vitpose_h_wholebody.onnx"
SIZES = {DETECTOR: "62 MB", POSE: "2.5 GB"}  # about; ViTPose is a folder of files
INSIDE = "end2end.onnx"  # the graph, where a published .onnx is a folder

SCORE = 0.05  # of a box that counts
OVERLAP = 0.5  # of two boxes that are the same person
FOLLOWED = 0.3  # overlap with the box of the frame before from which a box is the same person
SMALLEST = 10  # pixels a side of a box
MARGIN = 1.25  # of the crop around a box
KERNEL = 11  # of the blur of heat maps, in their pixels
SIGMA = 0.3 * ((KERNEL - 1) / 2 - 1) + 0.8
MEAN, SPREAD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


class PoseSource(Protocol):
    """What finds the points [n, 133, 3] of the person in frames that follow each other."""

    def __call__(self, frames: Sequence[Frames]) -> Points: ...


def find_models(ckpt_dir: Path | None, process_checkpoint: Path | None) -> tuple[Path, Path]:
    """The files of the detector and of the pose network in a published directory.  Errors: E4001, E4012, E8005."""
    root = process_checkpoint or (ckpt_dir / FOLDER if ckpt_dir else None)
    found = [_graph(root, name) for name in (DETECTOR, POSE)]
    if find_spec("onnxruntime") is None:
        cure = "Install it with `pip install 'wanloom[preprocess]'`, or give --keypoints."
        raise InputError("E8005", f"onnxruntime, which runs the networks, is not installed. {cure}")
    return found[0], found[1]


def _graph(root: Path | None, name: str) -> Path:
    what = "person detector" if name == DETECTOR else "pose network"
    path = root / name if root else Path(name)
    file = path / INSIDE if path.is_dir() else path
    if root is None or not file.is_file():
        where = f" in {root}" if root else ""
        raise InputError(
            "E4001", f"the {what} is missing{where}. It is {FOLDER}/{name} ({SIZES[name]}) of {REPOSITORY}. "
            "Give --ckpt-dir or --process-checkpoint, or the points with --keypoints.",
        )  # fmt: skip
    with file.open("rb") as head:
        if head.read(7) == b"version":
            raise InputError("E4012", f"{file}: no model but a Git LFS pointer. Fetch the file itself.")
    return file


class Network:
    """One ONNX graph with one input."""

    def __init__(self, path: Path) -> None:
        onnxruntime = import_module("onnxruntime")
        available = onnxruntime.get_available_providers()
        wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        self.path = path
        state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # its errors have no base of their own
        kinds = [kind for kind in vars(state).values() if isinstance(kind, type)]
        own = [kind for kind in kinds if issubclass(kind, Exception)]
        refusals: tuple[type[Exception], ...] = (*own, RuntimeError, ValueError, OSError)
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=wanted)
        except refusals as error:
            raise InputError("E4012", f"{path}: not read as an ONNX model ({str(error)[:120]}).") from error
        entry = self._session.get_inputs()[0]
        self._name, self.shape = entry.name, list(entry.shape)

    def side(self, axis: int, default: int) -> int:
        """The length of an axis of the input, or the default where the graph leaves it open."""
        length = self.shape[axis] if axis < len(self.shape) else None
        return length if isinstance(length, int) else default

    def __call__(self, batch: Floats) -> Floats:
        """The first output for a batch; one by one where the graph takes no more."""
        pieces = [batch] if self.shape[0] != 1 else [batch[i : i + 1] for i in range(len(batch))]
        outputs: list[Any] = [self._session.run(None, {self._name: np.ascontiguousarray(piece)})[0] for piece in pieces]
        return np.concatenate(outputs)


class WholeBody:
    """The points of one person in frames that follow each other: the largest person, then the one followed."""

    def __init__(self, detector: Path, pose: Path, *, swapped: bool = False) -> None:
        self._detector, self._pose = Network(detector), Network(pose)
        self._swapped = swapped
        self._last: Floats | None = None

    def __call__(self, frames: Sequence[Frames]) -> Points:
        """Points [n, 133, 3] of frames [h, w, 3] of one size, in their pixels.  Error: E4016 another network."""
        if self._swapped:
            frames = [frame[..., ::-1] for frame in frames]
        boxes = []
        for found in self._people(frames):
            self._last = choose_person(found, self._last)
            boxes.append(self._last)
        return self._points(frames, boxes)

    def alone(self, picture: Frames) -> Points:
        """The points [133, 3] of a picture that has nothing to do with the frames before."""
        self._last = None
        points: Points = self([picture])[0]
        self._last = None
        return points

    def _people(self, frames: Sequence[Frames]) -> list[Floats]:
        """For each frame the boxes [n, 5] of people: left, top, right, bottom, score."""
        height, width = frames[0].shape[:2]
        side = (self._detector.side(3, 640), self._detector.side(2, 640))
        pictures = np.stack([sample(frame, (0, 0, width, height), side) for frame in frames]) / np.float32(255)
        rows = self._detector(pictures.transpose(0, 3, 1, 2))
        if rows.ndim != 3 or rows.shape[2] != 6:
            raise InputError("E4016", f"{self._detector.path}: gives {list(rows.shape)}, expected boxes [n, m, 6].")
        scale = np.array((width / side[0], height / side[1]) * 2 + (1,), np.float32)
        return [apart(found[(found[:, 4] >= SCORE) & (found[:, 5] == 0), :5] * scale) for found in rows]

    def _points(self, frames: Sequence[Frames], boxes: list[Floats | None]) -> Points:
        wide, high = self._pose.side(3, 192), self._pose.side(2, 256)
        places = [crop_around(box, frame.shape[1::-1], wide / high) for box, frame in zip(boxes, frames, strict=True)]
        crops = np.stack([sample(frame, place, (wide, high)) for frame, place in zip(frames, places, strict=True)])
        pictures = ((crops / 255 - MEAN) / SPREAD).astype(np.float32)
        maps = self._pose(pictures.transpose(0, 3, 1, 2))
        if maps.ndim != 4 or maps.shape[1] != COUNT:
            raise InputError("E4016", f"{self._pose.path}: gives {list(maps.shape)}, expected [n, {COUNT}, h, w].")
        points = decode(maps)
        left, top, width, height = (np.array(side)[:, None] for side in zip(*places, strict=True))
        points[..., 0] = left + points[..., 0] * width / maps.shape[3]
        points[..., 1] = top + points[..., 1] * height / maps.shape[2]
        return points


def overlaps(box: Floats, others: Floats) -> Floats:
    """The area that a box shares with each of `others` [n, 4 or more], over the area that both cover."""
    sides = np.minimum(box[2:4], others[:, 2:4]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    total = np.prod(box[2:4] - box[:2]) + np.prod(others[:, 2:4] - others[:, :2], axis=1) - shared
    result: Floats = shared / np.maximum(total, 1e-6)
    return result


def apart(boxes: Floats) -> Floats:
    """Boxes [n, 5] without those that overlap a better one."""
    rest = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    kept = []
    while len(rest):
        kept.append(rest[0])
        rest = rest[1:][overlaps(rest[0], rest[1:]) <= OVERLAP]
    return np.stack(kept) if kept else boxes


def choose_person(boxes: Floats, last: Floats | None) -> Floats | None:
    """The largest box; after a first one, the largest of those that overlap it, so that nobody else takes over."""
    if not len(boxes):
        return None
    if last is not None and (near := overlaps(last, boxes) >= FOLLOWED).any():
        boxes = boxes[near]
    sizes = np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1)
    chosen: Floats = boxes[np.argmax(sizes)]
    return chosen


def crop_around(box: Floats | None, size: Sequence[int], ratio: float) -> tuple[float, float, float, float]:
    """(left, top, width, height) of the crop around a box, or around the whole frame without one; ratio: w / h."""
    left, top, right, bottom = (float(v) for v in box[:4]) if box is not None else (0.0, 0.0, *map(float, size))
    if right - left < SMALLEST or bottom - top < SMALLEST:
        left, top, right, bottom = 0.0, 0.0, *map(float, size)
    height = MARGIN * max((right - left) / ratio, bottom - top)
    width = height * ratio
    return (left + right - width) / 2, (top + bottom - height) / 2, width, height


def decode(maps: Floats) -> Points:
    """Heat maps [n, k, h, w] as points [n, k, 3]: x and y in pixels of the map, and the height of the peak.

    A Gaussian is fitted to the peak: one Newton step on the logarithm of the blurred map (Zhang et al. 2020, "DARK").
    """
    n, k, high, wide = maps.shape
    flat = maps.reshape(n, k, -1)
    best, score = flat.argmax(-1), flat.max(-1)
    x, y = best % wide, best // wide
    blurred = _blur(maps)
    top = blurred.reshape(n, k, -1).max(-1)
    level = np.log(np.maximum(blurred * (score / np.maximum(top, 1e-12))[..., None, None], 1e-10))
    row, column = np.ogrid[:n, :k]

    def at(dx: int, dy: int) -> Floats:
        values: Floats = level[row, column, np.clip(y + dy, 0, high - 1), np.clip(x + dx, 0, wide - 1)]
        return values

    dx, dy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    dxx = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4
    dyy = (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    dxy = (at(1, 1) - at(-1, 1) - at(1, -1) + at(-1, -1)) / 4
    area = dxx * dyy - dxy * dxy
    inside = (x > 1) & (x < wide - 2) & (y > 1) & (y < high - 2) & (area != 0) & (score > 0)
    area = np.where(inside, area, 1)
    step_x = np.where(inside, -(dyy * dx - dxy * dy) / area, 0)
    step_y = np.where(inside, -(dxx * dy - dxy * dx) / area, 0)
    return np.stack([x + step_x, y + step_y, np.maximum(score, 0)], -1).astype(np.float32)


def _blur(maps: Floats) -> Floats:
    """Maps smoothed by a Gaussian, zero outside."""
    reach = KERNEL // 2
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (2, 3):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        padded, length = np.pad(maps, pad), maps.shape[axis]
        taps = (np.take(padded, range(i, i + length), axis) * weight for i, weight in enumerate(weights))
        maps = np.sum(list(taps), axis=0)
    return maps
