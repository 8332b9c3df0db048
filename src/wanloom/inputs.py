"""What a video is made from: pictures, sounds and videos of a request, read or opened, and their facts for the Plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from wanloom import media
from wanloom.errors import InputError
from wanloom.plan import Input
from wanloom.request import ROLES, Request

# The files of a folder for animate, by the field of the request they stand for; the last two are for replacement.
FOLDER = {"image": "src_ref.png", "pose_video": "src_pose.mp4", "face_video": "src_face.mp4"}
FOLDER_REPLACE = {"background_video": "src_bg.mp4", "mask_video": "src_mask.mp4"}


INSIDE = 128  # a pixel of a mask from here on is in it: half of 255


@dataclass(frozen=True)
class VideoFile:
    """A video that was looked through and is decoded when it is needed: size (w, h), frames, frames a second."""

    path: Path
    role: str
    name: str
    sha256: str
    size: tuple[int, int]
    count: int
    rate: Fraction

    def open(self, fps: int | None = None) -> media.VideoReader:
        """Its frames, at `fps` or as they are.  Errors: those of `VideoReader`, E3025 when it is another file now."""
        video = media.VideoReader(self.path, self.role, fps=fps)
        if video.sha256 != self.sha256:
            raise InputError("E3025", f"{self.role}: {self.name} was changed while the run was under way.")
        return video


def with_folder(request: Request) -> Request:
    """The request with the files of its `src_root_path` filled in where it names none.  Error: E3001."""
    folder = None if request.src_root_path is None else Path(request.src_root_path)
    if folder is None:
        return request
    wanted = FOLDER | (FOLDER_REPLACE if request.replace_flag else {})
    found: dict[str, Path] = {}
    for field, name in wanted.items():
        if getattr(request, field) is None:
            if not (folder / name).is_file():
                raise InputError(
                    "E3001", f"src-root-path: {folder} has no {name}. `wanloom preprocess animate` makes the folder."
                )
            found[field] = folder / name
    return replace(request, **found)  # type: ignore[arg-type]


def read_inputs(request: Request) -> dict[str, Any]:
    """Role -> Picture, Sound or VideoFile, of all that the request names.

    Errors, with the option: E3001 to E3017, E3020 a mask without anything in it.
    """
    found: dict[str, Any] = {}
    for role in ROLES:
        source = getattr(request, role)
        if source is None:
            continue
        option = role.replace("_", "-")
        if role.endswith("_video"):
            with media.VideoReader(source, option) as video:
                found[role] = VideoFile(
                    Path(source), option, video.name, video.sha256, video.size, video.count, video.rate
                )
                if role == "mask_video" and not any((frame[..., 0] >= INSIDE).any() for frame in video):
                    raise InputError("E3020", f"{option}: empty in all frames. Give the mask of the person to replace.")
        elif role == "audio":
            found[role] = media.read_sound(source, option)
        else:
            found[role] = media.read_picture(source, option)
    return found


def facts(found: Mapping[str, Any]) -> tuple[Input, ...]:
    """What a Plan says of its inputs."""
    return tuple(_fact(role, item) for role, item in found.items())


def _fact(role: str, item: Any) -> Input:
    if isinstance(item, VideoFile):
        rate = item.rate.limit_denominator(10_000)
        return Input(
            role=role, name=item.name, sha256=item.sha256, size=item.size, frames=item.count,
            rate=(rate.numerator, rate.denominator),
        )  # fmt: skip
    if isinstance(item, media.Picture):
        return Input(role=role, name=item.name, sha256=item.sha256, size=item.size)
    return Input(role=role, name=item.name, sha256=item.sha256, samples=len(item.wave))
