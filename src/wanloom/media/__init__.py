"""Pictures, videos and sound in and out, and the Plan kept inside the file.

Reading is for files of strangers: only a few formats, told by their first bytes and not by the name, only regular files
(no device, pipe or socket is waited for), sizes checked before anything is unpacked.  Writing is for files that must
not fail late: `check_output` and `try_encoder` ask everything that can be asked before the work, frames are streamed,
and `save_video` publishes a file complete or not at all.
"""

from __future__ import annotations

from wanloom.media.background import BackgroundWriter
from wanloom.media.muxing import add_sound, can_carry_sound, has_sound
from wanloom.media.pictures import Frames, Picture, cover_crop, decode_image, read_image, read_picture, read_regular
from wanloom.media.reading import Clip, VideoReader, read_comment, read_video
from wanloom.media.sheets import contact_sheet
from wanloom.media.sound import Sound, read_sound
from wanloom.media.tts import Speaker, speak
from wanloom.media.writing import CODECS, Codec, VideoWriter, check_output, save_video, try_encoder

__all__ = [
    "CODECS",
    "BackgroundWriter",
    "Clip",
    "Codec",
    "Frames",
    "Picture",
    "Sound",
    "Speaker",
    "VideoReader",
    "VideoWriter",
    "add_sound",
    "can_carry_sound",
    "check_output",
    "contact_sheet",
    "cover_crop",
    "decode_image",
    "has_sound",
    "read_comment",
    "read_image",
    "read_picture",
    "read_regular",
    "read_sound",
    "read_video",
    "save_video",
    "speak",
    "try_encoder",
]
