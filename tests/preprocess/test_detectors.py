"""The wrappers of the ONNX networks, on small graphs with the inputs and outputs of the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from wanloom.errors import InputError
from wanloom.preprocess import detectors
from wanloom.preprocess.detectors import WholeBody, apart, choose_person, crop_around, decode, find_models, overlaps
from wanloom.preprocess.keypoints import COUNT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after the skip

BOXES = np.array(  # of a picture of 640 x 640: left, top, right, bottom, score, class
    [[160, 64, 480, 576, 0, 0], [0, 0, 640, 640, 0.9, 5], [10, 10, 60, 60, 0.02, 0], [500, 500, 600, 620, 0.9, 0]],
    np.float32,
)


def save(path, nodes, inputs, outputs, constants):
    made = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def detector(path, *, batch: int | str = "n", columns: int = 6):
    """Gives `BOXES`; the first one's score is the mean of the first channel."""
    first = np.zeros((1, len(BOXES), columns), np.float32)
    first[0, 0, 4] = 1
    boxes = np.pad(BOXES, ((0, 0), (0, columns - 6)))[None]
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Gather", ["means", "zero"], ["red"], axis=1),
        helper.make_node("Reshape", ["red", "column"], ["reds"]),
        helper.make_node("Mul", ["reds", "first"], ["scores"]),
        helper.make_node("Add", ["scores", "boxes"], ["output0"]),
    ]
    constants = {"zero": np.array([0]), "column": np.array([-1, 1, 1]), "first": first, "boxes": boxes}
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 640, 640])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [batch, len(BOXES), columns])],
        constants,
    )


def pose(path, *, batch: int | str = "n", count: int = COUNT):
    """Heat maps that are the first channel of the picture, every fourth pixel of it."""
    nodes = [
        helper.make_node("Slice", ["input", "from", "to", "axes", "steps"], ["thin"]),
        helper.make_node("Mul", ["thin", "copies"], ["output"]),
    ]
    constants = {
        "from": np.array([0, 0, 0]), "to": np.array([1, 256, 192]), "axes": np.array([1, 2, 3]),
        "steps": np.array([1, 4, 4]), "copies": np.ones((1, count, 1, 1), np.float32),
    }  # fmt: skip
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 256, 192])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, count, 64, 48])],
        constants,
    )


def spot(x: float, y: float, size=(320, 240), colour=(1.0, 1.0, 1.0)) -> np.ndarray:
    """A frame that is dark but for a bright spot at (x, y)."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    bright = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 9.0**2))
    return np.rint(125 + 130 * bright[..., None] * np.array(colour)).astype(np.uint8)


@pytest.fixture(params=["n", 1], ids=["batches", "one-by-one"])
def networks(request, tmp_path):
    return detector(tmp_path / "d.onnx", batch=request.param), pose(tmp_path / "p.onnx", batch=request.param)


def test_points_are_found_where_they_are_in_the_frame(networks):
    places = [(150.0, 120.0), (170.5, 90.25), (140.3, 150.8)]
    points = WholeBody(*networks)([spot(*place) for place in places])
    assert points.shape == (3, COUNT, 3)
    for found, (x, y) in zip(points, places, strict=True):
        assert np.abs(found[:, 0] - x).max() < 0.3
        assert np.abs(found[:, 1] - y).max() < 0.3
    assert (points[..., 2] > 0.5).all()


def test_red_is_the_first_channel_and_swapped_it_is_blue(networks):
    """The first box (its score is the mean of the first channel) is the largest one, found only in red light."""
    red = np.zeros((240, 320, 3), np.uint8)
    red[..., 0] = 200
    (plain,), (swapped,) = (WholeBody(*networks, swapped=swap)._people([red[..., ::step]])
                            for swap, step in ((False, 1), (False, -1)))  # fmt: skip
    assert sorted(plain[:, 4].round(2)) == [np.float32(0.78), np.float32(0.9)]
    assert swapped[:, 4].tolist() == [np.float32(0.9)]
    rightly = WholeBody(*networks)([spot(150, 120, colour=(1, 0, 0))])[0, 0]
    wrongly = WholeBody(*networks, swapped=True)([spot(150, 120, colour=(0, 0, 1))])[0, 0]
    assert np.allclose(rightly, wrongly)


def test_boxes_are_in_pixels_of_the_frame_people_only(networks):
    (boxes,) = WholeBody(*networks)._people([np.full((240, 320, 3), 128, np.uint8)])
    assert sorted(boxes[:, :4].round().tolist()) == [[80, 24, 240, 216], [250, 188, 300, 232]]


def test_the_points_of_a_picture_do_not_change_whom_the_video_follows(networks):
    source = WholeBody(*networks)
    picture = spot(160, 120)
    assert source.alone(picture).shape == (COUNT, 3)
    assert source._last is None


def test_overlap_is_the_shared_part():
    box, others = np.array([0, 0, 2, 2.0]), np.array([[1, 0, 3, 2.0], [0, 0, 2, 2], [5, 5, 6, 6]])
    assert np.allclose(overlaps(box, others), [1 / 3, 1, 0])


def test_of_two_boxes_on_one_person_the_better_one_stays():
    boxes = np.array([[0, 0, 10, 10, 0.6], [0, 0, 10, 11, 0.8], [20, 0, 30, 10, 0.1]])
    assert apart(boxes)[:, 4].tolist() == [0.8, 0.1]


def test_the_largest_person_is_taken_and_then_followed():
    small, large = np.array([0, 0, 10, 20, 0.9]), np.array([50, 0, 90, 80, 0.5])
    assert (choose_person(np.stack([small, large]), None) == large).all()
    assert (choose_person(np.stack([small, large]), small) == small).all()
    assert (choose_person(np.stack([large]), small) == large).all()
    assert choose_person(np.zeros((0, 5)), small) is None


def test_the_crop_is_a_quarter_larger_than_the_box_and_has_the_networks_proportions():
    assert crop_around(np.array([100, 100, 160, 300, 1.0]), (640, 480), 0.75) == (130 - 93.75, 75, 187.5, 250)
    assert crop_around(np.array([0, 100, 300, 200, 1.0]), (640, 480), 0.75) == (-37.5, -100, 375, 500)


@pytest.mark.parametrize("box", [None, np.array([5, 5, 9, 200, 0.9])])
def test_without_a_usable_box_the_whole_frame_is_looked_at(box):
    assert crop_around(box, (300, 400), 0.75) == (-37.5, -50, 375, 500)


@pytest.mark.parametrize("x", [20.0, 20.3, 24.75])
@pytest.mark.parametrize("y", [31.5, 40.1])
def test_a_gaussian_peak_is_found_between_pixels(x, y):
    columns, rows = np.meshgrid(np.arange(48), np.arange(64))
    peak = 0.8 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8).astype(np.float32)
    point = decode(peak[None, None])[0, 0]
    assert point[:2] == pytest.approx((x, y), abs=0.02)
    assert point[2] == pytest.approx(peak.max())


def test_a_peak_at_the_edge_stays_where_it_is_and_nothing_is_nothing():
    maps = np.zeros((1, 2, 64, 48), np.float32)
    maps[0, 0, 0, 47] = 0.7
    points = decode(maps)[0]
    assert points[0].tolist() == [47, 0, np.float32(0.7)]
    assert points[1, 2] == 0


# ---------------------------------------------------------------- files


def published(root, *, folder: bool):
    detector(root / detectors.DETECTOR)
    target = root / detectors.POSE
    pose(target / detectors.INSIDE if folder else target)
    return root


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_the_published_places_are_found(tmp_path, folder):
    published(tmp_path / "Wan" / "process_checkpoint", folder=folder)
    by_checkpoint = find_models(tmp_path / "Wan", None)
    assert by_checkpoint == find_models(None, tmp_path / "Wan" / "process_checkpoint")
    assert WholeBody(*by_checkpoint)([spot(160, 120)]).shape == (1, COUNT, 3)


def test_what_is_missing_is_named_with_size_and_repository(tmp_path):
    detector(tmp_path / detectors.DETECTOR)
    for given, words in (
        ((None, None), "det/yolov10m.onnx .62 MB."),
        ((None, tmp_path), "vitpose_h_wholebody.onnx .2.5 GB."),
    ):
        with pytest.raises(InputError, match=words + " of Wan-AI/Wan2.2-Animate-14B") as caught:
            find_models(*given)
        assert caught.value.code == "E4001"


def test_a_pointer_and_a_broken_file_are_told(tmp_path):
    published(tmp_path, folder=False)
    (tmp_path / detectors.POSE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError) as caught:
        find_models(None, tmp_path)
    assert caught.value.code == "E4012"
    (tmp_path / detectors.POSE).write_bytes(b"nothing that is a graph")
    with pytest.raises(InputError) as caught:
        WholeBody(*find_models(None, tmp_path))
    assert caught.value.code == "E4012"


def test_another_network_is_refused(tmp_path):
    good, wide = detector(tmp_path / "d.onnx"), detector(tmp_path / "wide.onnx", columns=84)
    for pair in ((wide, pose(tmp_path / "p.onnx")), (good, pose(tmp_path / "q.onnx", count=17))):
        with pytest.raises(InputError) as caught:
            WholeBody(*pair)([spot(160, 120)])
        assert caught.value.code == "E4016"


def test_without_onnxruntime_the_cure_is_said(tmp_path, monkeypatch):
    published(tmp_path, folder=False)
    monkeypatch.setattr(detectors, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wanloom\[preprocess\]") as caught:
        find_models(None, tmp_path)
    assert caught.value.code == "E8005"
