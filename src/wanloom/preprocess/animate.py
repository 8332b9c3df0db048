"""From a driving video and a picture to the folder of the animate model.

`check` asks everything that can be asked before the work: options, files, models, the place of the folder.  Then the
video is read twice, frame by frame: once to find the person (not at all, when points and masks were given), once to
draw and write.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, repeat
from pathlib import Path

import numpy as np

from wanloom.errors import InputError, WanloomWarning
from wanloom.media import Frames, Picture, read_picture, try_encoder
from wanloom.preprocess import outputs, sheet
from wanloom.preprocess.crops import Fit, Mask, Size, best_size, crop_face, face_boxes, letterbox
from wanloom.preprocess.detectors import BATCH, WholeBody, find_models
from wanloom.preprocess.drawing import SHOWN, draw_pose
from wanloom.preprocess.driving import RATES, Driving, open_driving
from wanloom.preprocess.keypoints import FACE, Person, Points, Recorded, person_of, read_keypoints
from wanloom.preprocess.masks import MaskReel, coarse, without
from wanloom.preprocess.retarget import NECK, Retarget, make_retarget
from wanloom.preprocess.sam2 import check_folder, load_segmenter

Progress = Callable[[str, int, int | None], None]  # stage, steps done, of how many (None: not known)
Drawer = Callable[[Person], Frames]

SAME_PROPORTIONS = 0.01


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a person asks for; see docs/animate.md."""

    video: Path
    image: Path
    out: Path
    replace: bool = False
    retarget: bool = False
    ckpt_dir: Path | None = None
    process_checkpoint: Path | None = None
    sam2: Path | None = None
    keypoints: Path | None = None
    image_keypoints: Path | None = None
    mask_video: Path | None = None
    reference_channels: bool = False
    size: Size = (1280, 720)  # only its area counts
    fps: float | None = 30.0  # None: the video's own
    dilation: int = 9
    cells: tuple[int, int] | None = (1, 1)
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """Settings with everything opened and checked."""

    settings: Settings
    driving: Driving
    picture: Picture
    fit: Fit  # from a driving frame to one of the folder
    points: Recorded | None
    picture_points: Recorded | None
    models: tuple[Path, Path] | None
    mask_video: Driving | None


@dataclass(frozen=True)
class Made:
    """The folder that was made: its files, and what the videos in it are."""

    folder: Path
    files: tuple[str, ...]
    frames: int
    size: Size
    fps: Fraction


def preprocess(settings: Settings, progress: Progress = lambda *_: None) -> Made:
    """Make the folder.  Errors: those of `check`, E3020 and E3026 nobody found, E3009 when a video ends early."""
    job = check(settings)
    points, reel, retarget = _find(job, progress)
    if person_of(points.transpose(1, 2, 0)).body[:, 2].max() < SHOWN:
        raise InputError("E3026", f"{job.driving.label}: nobody was found in any of its {len(points)} frames.")
    if not (points[:, FACE, 2] > 0).any():
        text = "W3030: face: none was found; src_face.mp4 shows the middle of the frames."
        warnings.warn(WanloomWarning(text), stacklevel=2)
    if reel is not None:
        reel.check()
    if retarget is not None:
        _check_inside(points, retarget, job.fit.target)
    _write(job, points, reel, retarget, progress)
    files = outputs.names(replace=settings.replace)
    return Made(settings.out, files, len(job.driving), job.fit.target, job.driving.fps)


# ---------------------------------------------------------------- before the work


def check(settings: Settings) -> Job:
    """Everything that can be wrong, said before any network is loaded.

    Errors: E2003 and E2032 values, E2023 options that contradict, E3001 to E3012 pictures and videos, E3019 and E3021
    files that do not belong together, E3028 points, E4001 and E8005 networks, E5001 and E5002 the folder, E8004.
    """
    _check_options(settings)
    outputs.check_folder(settings.out, overwrite=settings.overwrite, replace=settings.replace)
    picture = read_picture(settings.image)
    points = read_keypoints(settings.keypoints, "keypoints") if settings.keypoints else None
    picture_points = _picture_points(settings, picture)
    models = None
    if points is None or (settings.retarget and picture_points is None):
        models = find_models(settings.ckpt_dir, settings.process_checkpoint)
    if settings.replace and settings.mask_video is None:
        check_folder(settings.sam2)
    driving = open_driving(settings.video, "video", settings.fps)
    if points is not None:
        _check_pair(points.size, len(points.points), driving, "keypoints", "E3028")
    mask_video = open_driving(settings.mask_video, "mask-video") if settings.mask_video else None
    if mask_video is not None:
        _check_pair(mask_video.size, mask_video.total, driving, "mask-video", "E3019")
        mask_video = replace(mask_video, chosen=driving.chosen)
    target = best_size(driving.size if settings.replace else picture.size, settings.size[0] * settings.size[1])
    try_encoder(Path(outputs.POSE), size=target, fps=30, quality=outputs.QUALITY)
    fit = letterbox(driving.size, target)
    return Job(settings, driving, picture, fit, points, picture_points, models, mask_video)


def _check_options(settings: Settings) -> None:
    if settings.fps is not None and not RATES[0] <= settings.fps <= RATES[1]:
        raise InputError("E2032", f"fps: got {settings.fps:g}, expected 1 to 120, or -1 for the video's own.")
    if settings.replace and settings.retarget:
        raise InputError("E2023", "retarget: conflicts with --replace, which keeps the person's place in the scene.")
    needs = [
        ("--image-keypoints", settings.image_keypoints, "--retarget", settings.retarget),
        ("--mask-video", settings.mask_video, "--replace", settings.replace),
        ("--sam2", settings.sam2, "--replace", settings.replace),
    ]
    for option, value, other, given in needs:
        if value is not None and not given:
            raise InputError("E2023", f"{option}: is only used with {other}. Give that too, or leave it out.")
    if settings.sam2 is not None and settings.mask_video is not None:
        raise InputError("E2023", "--sam2: conflicts with --mask-video. The masks come from one of them.")
    detects = settings.keypoints is None or (settings.retarget and settings.image_keypoints is None)
    if settings.reference_channels and not detects:
        raise InputError("E2023", "--reference-channels: is about the networks, and with --keypoints none is used.")


def _picture_points(settings: Settings, picture: Picture) -> Recorded | None:
    if settings.image_keypoints is None:
        return None
    points = read_keypoints(settings.image_keypoints, "image-keypoints")
    if len(points.points) != 1:
        raise InputError("E3028", f"image-keypoints: has {len(points.points)} frames, expected one.")
    _check_proportions(points.size, picture.size, "image-keypoints", "the picture", "E3028")
    return points


def _check_pair(size: Size, count: int, driving: Driving, role: str, code: str) -> None:
    """What was made from the driving video must have its frames and its proportions."""
    if count != driving.total:
        raise InputError("E3021", f"{role}: has {count} frames, the driving video has {driving.total}: one for each.")
    _check_proportions(size, driving.size, role, "the driving video", code)


def _check_proportions(size: Size, other: Size, role: str, what: str, code: str) -> None:
    if abs(size[0] * other[1] / (size[1] * other[0]) - 1) > SAME_PROPORTIONS:
        raise InputError(code, f"{role}: is for {size[0]}x{size[1]}, {what} is {other[0]}x{other[1]}.")


# ---------------------------------------------------------------- the first reading


def _find(job: Job, progress: Progress) -> tuple[Points, MaskReel | None, Retarget | None]:
    """The points [F, 133, 3] in pixels of the driving video, the masks in those of the folder, the other body."""
    settings, driving = job.settings, job.driving
    if job.models or settings.sam2:
        progress("load", 0, None)
    networks = WholeBody(*job.models, swapped=settings.reference_channels) if job.models else None
    points = np.zeros((len(driving), 0, 3), np.float32)
    if job.points is not None:
        points = job.points.in_pixels_of(driving.size)[list(driving.chosen)]
    picture_points = _points_of_picture(job, networks) if settings.retarget else None
    reel = MaskReel(job.fit.target) if settings.replace else None
    if job.points is None or settings.sam2:
        found = _search(job, points, networks if job.points is None else None, reel, progress)
        points = np.stack(list(found))
    if job.mask_video is not None and reel is not None:
        fit = replace(job.fit, source=job.mask_video.size)
        for index, frame in enumerate(job.mask_video):
            progress("masks", index, len(driving))
            reel.add(fit.mask(frame.mean(2) >= 127.5))
        progress("masks", len(driving), len(driving))
    if picture_points is None:
        return points, reel, None
    first, wanted = person_of(points[0]).body, person_of(picture_points).body
    return points, reel, make_retarget(first, driving.size, wanted, job.fit.target)


def _search(
    job: Job, known: Points, networks: WholeBody | None, reel: MaskReel | None, progress: Progress
) -> Iterator[Points]:
    """The points [133, 3] of each frame, known or found, while the masks go onto the reel."""
    segment = load_segmenter(job.settings.sam2) if job.settings.sam2 else None
    done, total = 0, len(job.driving)
    progress("find", done, total)
    video = iter(job.driving)
    while frames := list(islice(video, BATCH)):
        points = networks(frames) if networks else known[done : done + len(frames)]
        for frame, found in zip(frames, points, strict=True):
            if segment is not None and reel is not None:
                reel.add(job.fit.mask(segment(frame, person_of(found).body)))
            done += 1
            progress("find", done, total)
            yield found


def _check_inside(points: Points, retarget: Retarget, size: Size) -> None:
    """Warning: W3031 when the other body walks out of the picture."""
    bodies = [retarget.apply(person_of(frame)).body[NECK] for frame in points]
    outside = sum(1 for x, y, score in bodies if score >= SHOWN and not (0 <= x < size[0] and 0 <= y < size[1]))
    if outside:
        where = f"outside of {size[0]}x{size[1]} in {outside} of {len(bodies)} frames"
        text = f"W3031: retarget: the person is {where}. Use a picture with more room around the person."
        warnings.warn(WanloomWarning(text), stacklevel=3)


def _points_of_picture(job: Job, networks: WholeBody | None) -> Points:
    """The points [133, 3] of the picture, in pixels of the folder's frames."""
    if job.picture_points is not None:
        points: Points = job.picture_points.in_pixels_of(job.picture.size)[0]
    else:
        assert networks is not None
        points = networks.alone(job.picture.pixels)
    return letterbox(job.picture.size, job.fit.target).points(points)


# ---------------------------------------------------------------- the second reading


def _drawer(job: Job, retarget: Retarget | None) -> Drawer:
    """How a person of the driving video is drawn for the folder."""
    fit = job.fit
    if retarget is not None:
        return lambda person: draw_pose(retarget.apply(person), fit.target)
    if job.settings.replace:
        return lambda person: draw_pose(fit.person(person), fit.target)
    return lambda person: fit.image(draw_pose(person, fit.source))  # thinned with the frame, as in training


def _write(job: Job, points: Points, reel: MaskReel | None, retarget: Retarget | None, progress: Progress) -> None:
    settings, driving = job.settings, job.driving
    draw, boxes = _drawer(job, retarget), face_boxes(points, driving.size)
    masks: Iterator[Mask | None] = repeat(None)
    if reel is not None:
        masks = (coarse(mask, dilation=settings.dilation, cells=settings.cells) for mask in reel.filled())
    shown, columns = sheet.times(len(driving)), []
    with outputs.open_folder(settings.out, driving, replace=settings.replace, overwrite=settings.overwrite) as folder:
        folder.picture(outputs.REFERENCE, job.picture.pixels)
        progress("write", 0, len(driving))
        for index, (frame, found, box, mask) in enumerate(zip(driving, points, boxes, masks, strict=False)):
            pose, face = draw(person_of(found)), crop_face(frame, box)
            folder.write(outputs.POSE, pose)
            folder.write(outputs.FACE, face)
            if mask is not None:
                frame = job.fit.image(frame)
                folder.write(outputs.BACKGROUND, without(frame, mask))
                folder.write_mask(mask)
            if index in shown:
                columns.append(sheet.column(index, frame, pose, face, mask))
            progress("write", index + 1, len(driving))
        folder.picture(outputs.SHEET, sheet.make_sheet(columns, driving.fps))
