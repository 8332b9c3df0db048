"""The whole way: a video, a picture and points become the folder, and nothing else ever lies in it."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import walker
from PIL import Image

from wanloom.errors import InputError, WanloomWarning
from wanloom.media import read_video
from wanloom.preprocess import animate, detectors, outputs
from wanloom.preprocess.animate import Settings, check, preprocess
from wanloom.preprocess.crops import best_size, letterbox
from wanloom.preprocess.drawing import BONES, COLOURS, draw_pose
from wanloom.preprocess.driving import open_driving
from wanloom.preprocess.keypoints import BODY, person_of
from wanloom.preprocess.masks import coarse

SIZE, PICTURE = (256, 192), (160, 224)
FRAMES = 12


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return walker.scene(tmp_path_factory.mktemp("scene"), frames=FRAMES, size=SIZE, picture_size=PICTURE)


@pytest.fixture
def settings(scene, tmp_path):
    return Settings(
        video=scene / "video.mp4",
        image=scene / "image.png",
        out=tmp_path / "out",
        keypoints=scene / "video.json",
        size=(256, 256),
    )


@pytest.fixture(scope="module")
def replaced(scene, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return preprocess(
        Settings(
            video=scene / "video.mp4", image=scene / "image.png", out=out, keypoints=scene / "video.json",
            mask_video=scene / "mask.mp4", replace=True, size=(256, 256), cells=(3, 5), dilation=4,
        )
    )  # fmt: skip


def points(scene) -> np.ndarray:
    return np.array(json.loads((scene / "video.json").read_text())["frames"], np.float32)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- animation


def test_the_folder_has_its_files_and_nothing_else(settings):
    made = preprocess(settings)
    assert names(settings.out) == ["sheet.png", "src_face.mp4", "src_pose.mp4", "src_ref.png"]
    assert set(made.files) == set(names(settings.out))
    assert (made.frames, made.fps, made.size) == (FRAMES, 30, best_size(PICTURE, 256 * 256))
    pose, rate = read_video(settings.out / "src_pose.mp4")
    face, _ = read_video(settings.out / "src_face.mp4")
    assert pose.shape == (FRAMES, made.size[1], made.size[0], 3)
    assert face.shape == (FRAMES, 512, 512, 3)
    assert rate == 30


def test_the_pose_video_is_the_drawing_in_the_pictures_size(settings, scene):
    made = preprocess(settings)
    pose, _ = read_video(settings.out / "src_pose.mp4")
    fit = letterbox(SIZE, made.size)
    for index, frame in enumerate(points(scene)):
        wanted = fit.image(draw_pose(person_of(frame), SIZE)).astype(int)
        # 4:2:0 blurs the colours of thin lines; their brightness stays
        assert np.abs(pose[index].astype(int).mean(2) - wanted.mean(2)).mean() < 2


def test_the_face_video_shows_the_face(settings):
    preprocess(settings)
    face, _ = read_video(settings.out / "src_face.mp4")
    assert np.abs(face[:, 256, 256].astype(int) - (230, 180, 150)).max() < 12  # skin in the middle
    eyes = (face.astype(int).sum(3) < 150).mean((1, 2))
    assert (eyes > 0.02).all()


def test_the_reference_is_the_picture_itself_as_png(settings, scene, tmp_path):
    Image.open(scene / "image.png").save(tmp_path / "me.jpg", quality=95)
    preprocess(replace(settings, image=tmp_path / "me.jpg"))
    with Image.open(settings.out / "src_ref.png") as reference:
        assert (reference.format, reference.size) == ("PNG", PICTURE)
        assert (np.array(reference) == np.array(Image.open(tmp_path / "me.jpg"))).all()


def test_the_sheet_shows_six_times(settings):
    preprocess(settings)
    with Image.open(settings.out / "sheet.png") as sheet:
        pixels = np.array(sheet)
    assert pixels.shape[1] == 6 + 6 * 246
    columns = [pixels[30:, 6 + i * 246 : 246 + i * 246] for i in range(6)]
    assert all(column.std() > 20 for column in columns)
    assert (columns[0] != columns[5]).any()


def test_another_rate_takes_other_frames_and_points(settings, scene):
    made = preprocess(replace(settings, fps=10.0))
    assert (made.frames, made.fps) == (4, 10)
    pose, rate = read_video(settings.out / "src_pose.mp4")
    assert rate == 10
    job = check(replace(settings, fps=10.0, out=settings.out / "x"))
    assert job.driving.chosen == (0, 3, 6, 9)
    wanted = job.fit.image(draw_pose(person_of(points(scene)[9]), SIZE)).astype(int)
    assert np.abs(pose[3].astype(int).mean(2) - wanted.mean(2)).mean() < 2


@pytest.mark.filterwarnings("ignore:W3031")
def test_retargeted_bones_are_the_pictures(settings, scene):
    """The first frame of the pose video: the picture's person in its own place."""
    made = preprocess(replace(settings, retarget=True, image_keypoints=scene / "image.json"))
    pose, _ = read_video(settings.out / "src_pose.mp4")
    still = np.array(json.loads((scene / "image.json").read_text())["frames"][0], np.float32)
    body = letterbox(PICTURE, made.size).person(person_of(still)).body
    height = body[BODY.index("left_ankle"), 1] - body[BODY.index("nose"), 1]
    drawn = np.flatnonzero((pose[0].max(2) > 60).any(1))
    assert abs((drawn.max() - drawn.min()) / height - 1.1) < 0.1  # eyes and toes reach a little further
    thigh = BONES.index((BODY.index("right_hip"), BODY.index("right_knee")))
    assert COLOURS[thigh] != (0, 0, 0)
    x, y = (body[BODY.index("right_hip"), :2] + body[BODY.index("right_knee"), :2]) / 2
    assert pose[0][int(y) - 2 : int(y) + 3, int(x) - 3 : int(x) + 4].max() > 90


def test_a_body_that_walks_out_of_the_picture_is_told(settings, scene, tmp_path):
    large = walker.stand(30, 20, 180)[None]
    walker.write_points(tmp_path / "large.json", large, PICTURE)
    with pytest.warns(WanloomWarning, match="W3031: .* of 12 frames"):
        preprocess(replace(settings, retarget=True, image_keypoints=tmp_path / "large.json"))


# ---------------------------------------------------------------- replacement


def test_replacement_adds_background_and_mask(replaced):
    assert names(replaced.folder) == [
        "sheet.png", "src_bg.mp4", "src_face.mp4", "src_mask.mp4", "src_pose.mp4", "src_ref.png",
    ]  # fmt: skip
    assert replaced.size == best_size(SIZE, 256 * 256)


def test_the_mask_video_is_exact(replaced, scene):
    """0 and 255 and nothing else, in all channels, and just where the coarse mask is."""
    found, _ = read_video(replaced.folder / "src_mask.mp4")
    assert set(np.unique(found)) == {0, 255}
    fit = letterbox(SIZE, replaced.size)
    given, _ = read_video(scene / "mask.mp4")
    for index, mask in enumerate(given):
        wanted = coarse(fit.mask(mask.mean(2) >= 127.5), dilation=4, cells=(3, 5))
        assert (found[index] == np.where(wanted, 255, 0)[..., None]).all()


def test_the_mask_covers_the_person(replaced, scene):
    found, _ = read_video(replaced.folder / "src_mask.mp4")
    fit = letterbox(SIZE, replaced.size)
    for index, frame in enumerate(points(scene)):
        outline = fit.mask(walker.picture(frame, SIZE)[1])
        assert (found[index, ..., 0][outline] == 255).mean() > 0.999


def test_the_background_is_the_frame_without_the_person(replaced, scene):
    background, _ = read_video(replaced.folder / "src_bg.mp4")
    mask, _ = read_video(replaced.folder / "src_mask.mp4")
    frames, _ = read_video(scene / "video.mp4")
    inside = mask[..., 0] > 127
    assert background[inside].mean() < 2
    fit = letterbox(SIZE, replaced.size)
    shown = np.stack([fit.image(frame) for frame in frames])
    assert np.abs(background[~inside].astype(int) - shown[~inside]).mean() < 3


def test_the_pose_of_a_replacement_lies_on_the_person(replaced, scene):
    pose, _ = read_video(replaced.folder / "src_pose.mp4")
    fit = letterbox(SIZE, replaced.size)
    wanted = draw_pose(fit.person(person_of(points(scene)[5])), replaced.size).astype(int)
    assert np.abs(pose[5].astype(int).mean(2) - wanted.mean(2)).mean() < 2


def write_masks(scene, path, empty: set[int]):
    masks, _ = read_video(scene / "mask.mp4")
    masks = masks.copy()
    masks[list(empty)] = 0
    return walker.write_video(path, masks)


def test_a_mask_that_is_empty_for_a_moment_is_the_one_before(settings, scene, tmp_path):
    masks = write_masks(scene, tmp_path / "m.mp4", {4})
    with pytest.warns(WanloomWarning, match="W3020: "):
        preprocess(replace(settings, replace=True, mask_video=masks))
    found, _ = read_video(settings.out / "src_mask.mp4")
    assert (found[4] == found[3]).all()
    assert (found[5] != found[4]).any()


def test_a_clip_without_any_mask_is_refused_and_leaves_nothing(settings, scene, tmp_path):
    masks = write_masks(scene, tmp_path / "m.mp4", set(range(FRAMES)))
    with pytest.raises(InputError) as caught:
        preprocess(replace(settings, replace=True, mask_video=masks))
    assert caught.value.code == "E3020"
    assert not settings.out.exists()


# ---------------------------------------------------------------- sound


def test_the_sound_comes_along_bit_for_bit(settings, scene, tmp_path):
    frames, _ = read_video(scene / "video.mp4")
    loud = walker.write_with_sound(tmp_path / "loud.mp4", np.concatenate([frames, frames, frames]))
    walker.write_points(tmp_path / "p.json", np.concatenate([points(scene)] * 3), SIZE)
    preprocess(replace(settings, video=loud, keypoints=tmp_path / "p.json"))

    def packets(path):
        with av.open(str(path)) as video:
            stream = video.streams.audio[0]
            found = [(bytes(p), p.pts * p.time_base) for p in video.demux(stream) if p.size]
            return stream.codec_context.name, found

    assert packets(settings.out / "src_pose.mp4") == packets(loud)
    assert len(read_video(settings.out / "src_pose.mp4")[0]) == 36


def test_sound_that_fits_into_no_mp4_is_left_out_and_said(settings, scene, tmp_path):
    frames, _ = read_video(scene / "video.mp4")
    loud = walker.write_with_sound(tmp_path / "loud.mkv", frames, codec="pcm_u8")
    with pytest.warns(WanloomWarning, match="W3029: sound: pcm_u8"):
        preprocess(replace(settings, video=loud))
    with av.open(str(settings.out / "src_pose.mp4")) as video:
        assert not video.streams.audio


# ---------------------------------------------------------------- the networks' place


class Standin:
    """Finds the walker in frames it is given, as the networks would."""

    def __init__(self, detector, pose, *, swapped=False):
        self.swapped, self.seen = swapped, 0
        Standin.last = self

    def __call__(self, frames):
        found = walker.walk(FRAMES, SIZE)[self.seen : self.seen + len(frames)]
        self.seen += len(frames)
        return found

    def alone(self, picture):
        return walker.stand(PICTURE[0] / 2, 0.2 * PICTURE[1], 0.6 * PICTURE[1])


@pytest.fixture
def networks(monkeypatch, tmp_path):
    monkeypatch.setattr(animate, "WholeBody", Standin)
    monkeypatch.setattr(animate, "find_models", lambda *_: (tmp_path, tmp_path))
    monkeypatch.setattr(animate, "BATCH", 5)


def test_found_points_and_given_points_make_the_same_folder(settings, networks, tmp_path):
    preprocess(settings)
    found = replace(settings, keypoints=None, out=tmp_path / "found", reference_channels=True)
    stages = []
    preprocess(found, lambda name, done, total: stages.append((name, done, total)))
    assert Standin.last.seen == FRAMES
    assert Standin.last.swapped
    given, made = (read_video(folder / "src_pose.mp4")[0].astype(int) for folder in (settings.out, found.out))
    assert np.abs(given - made).mean() < 0.5  # the file has hundredths of pixels
    assert stages[0] == ("load", 0, None)
    assert ("find", FRAMES, FRAMES) in stages
    assert stages[-1] == ("write", FRAMES, FRAMES)


def test_masks_by_sam2_see_every_frame_with_its_body(settings, networks, monkeypatch, tmp_path):
    bodies = []

    def segment(frame, body):
        bodies.append(body)
        mask = np.zeros(frame.shape[:2], np.bool_)
        x, y = body[BODY.index("neck"), :2]
        mask[int(y) - 5 : int(y) + 5, int(x) - 5 : int(x) + 5] = True
        return mask

    monkeypatch.setattr(animate, "load_segmenter", lambda folder: segment)
    monkeypatch.setattr(animate, "check_folder", lambda folder: folder)
    preprocess(replace(settings, replace=True, sam2=tmp_path, dilation=0, cells=None))
    assert len(bodies) == FRAMES
    mask, _ = read_video(settings.out / "src_mask.mp4")
    fit = letterbox(SIZE, best_size(SIZE, 256 * 256))
    for index, body in enumerate(bodies):
        rows, columns = np.nonzero(mask[index, ..., 0])
        assert abs(columns.mean() - fit.points(body)[BODY.index("neck"), 0]) < 2.5
        assert abs(rows.mean() - fit.points(body)[BODY.index("neck"), 1]) < 2.5


def test_the_video_is_streamed(settings, monkeypatch):
    """A frame is written before the one after the next is decoded."""
    decoded, written = [], []
    real = open_driving(settings.video, "video").__class__.__iter__

    def counted(self):
        for frame in real(self):
            decoded.append(1)
            yield frame

    def note(self, name, frame):
        written.append(len(decoded))
        return original(self, name, frame)

    original = outputs.Folder.write
    monkeypatch.setattr("wanloom.preprocess.driving.Driving.__iter__", counted)
    monkeypatch.setattr(outputs.Folder, "write", note)
    preprocess(settings)
    assert written[::2] == list(range(1, FRAMES + 1))


# ---------------------------------------------------------------- what is refused


def refused(settings) -> str:
    with pytest.raises(InputError) as caught:
        preprocess(settings)
    assert not settings.out.exists() or names(settings.out) == ["src_pose.mp4"]
    return caught.value.code


def test_files_that_are_there_are_not_replaced_unless_asked(settings):
    settings.out.mkdir()
    (settings.out / "src_pose.mp4").write_text("mine")
    assert refused(settings) == "E5002"
    assert (settings.out / "src_pose.mp4").read_text() == "mine"
    preprocess(replace(settings, overwrite=True))
    assert len(read_video(settings.out / "src_pose.mp4")[0]) == FRAMES


def test_other_files_in_the_folder_are_left_alone(settings):
    settings.out.mkdir()
    (settings.out / "notes.txt").write_text("mine")
    preprocess(settings)
    assert (settings.out / "notes.txt").read_text() == "mine"


def test_an_error_on_the_way_leaves_nothing(settings, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.Folder, "picture", fail)
    assert refused(settings) == "E5003"


def test_without_networks_or_points_the_files_are_named(settings):
    assert refused(replace(settings, keypoints=None)) == "E4001"
    assert refused(replace(settings, retarget=True)) == "E4001"
    assert refused(replace(settings, replace=True)) == "E4001"


def test_a_folder_without_networks_is_told(settings, tmp_path):
    with pytest.raises(InputError, match=detectors.DETECTOR):
        preprocess(replace(settings, keypoints=None, ckpt_dir=tmp_path))


def test_options_that_contradict_each_other(settings, scene, tmp_path):
    image_keypoints, masks = scene / "image.json", scene / "mask.mp4"
    for change in (
        {"replace": True, "retarget": True},
        {"image_keypoints": image_keypoints},
        {"mask_video": masks},
        {"sam2": tmp_path},
        {"replace": True, "mask_video": masks, "sam2": tmp_path},
        {"reference_channels": True},
    ):
        assert refused(replace(settings, **change)) == "E2023", change


def test_numbers_beyond_their_limits(settings):
    assert refused(replace(settings, fps=0.5)) == "E2032"
    assert refused(replace(settings, size=(10, 10))) == "E2003"


def test_points_and_masks_must_belong_to_the_video(settings, scene, tmp_path):
    fewer = walker.write_points(tmp_path / "fewer.json", points(scene)[:-1], SIZE)
    assert refused(replace(settings, keypoints=fewer)) == "E3021"
    wide = walker.write_points(tmp_path / "wide.json", points(scene), (256, 100))
    assert refused(replace(settings, keypoints=wide)) == "E3028"
    masks, _ = read_video(scene / "mask.mp4")
    short = walker.write_video(tmp_path / "short.mp4", masks[:-1])
    assert refused(replace(settings, replace=True, mask_video=short)) == "E3021"
    square = walker.write_video(tmp_path / "square.mp4", masks[:, :, :192])
    assert refused(replace(settings, replace=True, mask_video=square)) == "E3019"
    two = walker.write_points(tmp_path / "two.json", walker.walk(2, PICTURE), PICTURE)
    assert refused(replace(settings, retarget=True, image_keypoints=two)) == "E3028"


def test_a_mask_video_may_be_smaller_than_the_video(settings, scene, tmp_path):
    masks, _ = read_video(scene / "mask.mp4")
    small = walker.write_video(tmp_path / "small.mp4", masks[:, ::2, ::2])
    preprocess(replace(settings, replace=True, mask_video=small))
    found, _ = read_video(settings.out / "src_mask.mp4")
    assert set(np.unique(found)) == {0, 255}


def test_a_video_without_anybody_is_refused(settings, scene, tmp_path):
    nobody = points(scene)
    nobody[..., 2] = 0.3
    empty = walker.write_points(tmp_path / "empty.json", nobody, SIZE)
    assert refused(replace(settings, keypoints=empty)) == "E3026"


def test_a_clip_without_a_face_is_told(settings, scene, tmp_path):
    faceless = points(scene)
    faceless[:, 23:91, 2] = 0
    path = walker.write_points(tmp_path / "faceless.json", faceless, SIZE)
    with pytest.warns(WanloomWarning, match="W3030: "):
        preprocess(replace(settings, keypoints=path))


def test_a_single_frame_is_enough(settings, scene, tmp_path):
    frames, _ = read_video(scene / "video.mp4")
    one = walker.write_video(tmp_path / "one.mp4", frames[:1])
    path = walker.write_points(tmp_path / "one.json", points(scene)[:1], SIZE)
    made = preprocess(replace(settings, video=one, keypoints=path))
    assert (made.frames, made.fps) == (1, Fraction(30))
