"""The person's outline in every frame, by SAM2: transformers' `Sam2VideoModel`, fed one frame after the other.

Eight joints of the body are clicked on (nose, neck, shoulders, hips, ankles), those that are seen: at first, every 100
frames, and whenever the person was lost.  What the model remembers of the past is kept to what it looks at, so that
memory does not grow with the video.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanloom.errors import InputError
from wanloom.media import Frames
from wanloom.preprocess.crops import Mask
from wanloom.preprocess.detectors import MEAN, SPREAD
from wanloom.preprocess.drawing import SHOWN
from wanloom.preprocess.keypoints import BODY, Points

if TYPE_CHECKING:
    import torch

REPOSITORY = "facebook/sam2-hiera-large"
SIZE = "0.9 GB"
CLICKED = [
    BODY.index(name)
    for name in (
        "nose", "neck", "right_shoulder", "left_shoulder", "right_hip", "left_hip", "right_ankle", "left_ankle",
    )
]  # fmt: skip
FEWEST = 3  # joints to click on
EVERY = 100  # frames from one set of clicks to the next
CLICKED_KEPT = 4  # frames with clicks that the model still looks at: the first and the latest ones
OBJECT = 1


def check_folder(folder: Path | None) -> Path:
    """A directory in transformers' format.  Error: E4001, which names file, size and repository."""
    if folder is not None and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    where = f" in {folder}" if folder else ""
    raise InputError(
        "E4001", f"the mask network SAM2 is missing{where}. It is config.json and model.safetensors ({SIZE}) of "
        f"{REPOSITORY}. Give their directory with --sam2, or masks with --mask-video.",
    )  # fmt: skip


def load_segmenter(folder: Path) -> Segmenter:
    """SAM2 from a directory, on a GPU where there is one.  Error: E4016 when it is another model."""
    import torch
    import transformers

    library: Any = transformers  # its annotations are not complete
    library.utils.logging.disable_progress_bar()  # we show our own
    try:
        model, about = library.Sam2VideoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError("E4016", f"{folder}: not read as a Sam2VideoModel ({str(error)[:120]}).") from error
    if about["missing_keys"]:  # they would be random
        few = ", ".join(sorted(about["missing_keys"])[:3])
        raise InputError("E4016", f"{folder}: no Sam2VideoModel, {len(about['missing_keys'])} tensors lack: {few}.")
    return Segmenter(model, "cuda" if torch.cuda.is_available() else "cpu")


class Segmenter:
    """Masks of one person in frames that follow each other."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        import torch
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        self._model = model.eval().to(device)
        side = model.config.image_size
        self._device, self._side = device, side if isinstance(side, int) else side[0]
        self._reach = max(int(model.config.num_maskmem), int(model.config.max_object_pointers_in_encoder))
        self._session: Any = Sam2VideoInferenceSession(
            inference_device=device, inference_state_device=device, video_storage_device=device, dtype=torch.float32
        )
        self._at = 0
        self._clicked: int | None = None  # the last frame with clicks
        self._lost = False

    def __call__(self, frame: Frames, body: Points) -> Mask:
        """The mask [h, w] of the next frame [h, w, 3], whose body points are [20, 3]; empty until somebody is seen."""
        import torch
        from torch.nn import functional

        height, width = frame.shape[:2]
        index, self._at = self._at, self._at + 1
        if self._lost or self._clicked is None or index - self._clicked >= EVERY:
            self._click(index, body, (width, height))
        if self._clicked is None:
            return np.zeros((height, width), np.bool_)
        with torch.inference_mode():
            found = self._model(inference_session=self._session, frame_idx=index, frame=self._pixels(frame))
            logits = functional.interpolate(found.pred_masks.float(), (height, width), mode="bilinear")
        mask: Mask = (logits[0, 0] > 0).cpu().numpy()
        self._lost = not mask.any()
        self._forget(index)
        return mask

    def _click(self, index: int, body: Points, size: tuple[int, int]) -> None:
        joints = body[CLICKED]
        inside = ((joints[:, :2] >= 0) & (joints[:, :2] < size)).all(1)
        seen = joints[inside & (joints[:, 2] >= SHOWN), :2]
        if len(seen) < FEWEST:
            return
        import torch

        places = torch.from_numpy(seen * (self._side / np.array(size))).float()
        clicks = {
            "point_coords": places[None, None],
            "point_labels": torch.ones(1, 1, len(seen), dtype=torch.int32),
        }
        self._session.add_point_inputs(self._session.obj_id_to_idx(OBJECT), index, clicks)
        self._session.obj_with_new_inputs = [OBJECT]
        self._clicked = index

    def _pixels(self, frame: Frames) -> torch.Tensor:
        import torch
        from PIL import Image

        picture = Image.fromarray(frame).resize((self._side, self._side), Image.Resampling.BILINEAR)
        pixels = ((np.asarray(picture) / 255 - MEAN) / SPREAD).astype(np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self._device)

    def _forget(self, index: int) -> None:
        """Drop what the model will not look at again."""
        self._session.processed_frames.pop(index)
        outputs = self._session.output_dict_per_obj[self._session.obj_id_to_idx(OBJECT)]
        outputs["non_cond_frame_outputs"].pop(index - self._reach, None)
        clicked = outputs["cond_frame_outputs"]
        for old in sorted(clicked)[1 : 1 - CLICKED_KEPT]:
            del clicked[old]
