"""SAM2's wrapper, on a small random model of the published form and on one that says what it was asked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import walker

from wanloom.errors import InputError
from wanloom.preprocess import sam2
from wanloom.preprocess.keypoints import person_of

SIZE = (96, 64)


@pytest.fixture(scope="module")
def tiny_model():
    """A Sam2VideoModel of 64 x 64 pixels and random weights."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 4, 4, 2], "global_attention_blocks": [3],
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 128, "image_size": 64, "patch_size": 16},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=64,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32,
        max_object_pointers_in_encoder=4,
        num_maskmem=3,
    )
    model = Sam2VideoModel(config)
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(5.0)  # somebody is always there
    return model


def frames(count: int):
    points = walker.walk(count, SIZE)
    return [(walker.picture(frame, SIZE)[0], person_of(frame).body) for frame in points]


class Watched:
    """Stands in for the model: a mask around the clicks, and a record of them."""

    def __init__(self, answers=None) -> None:
        self.config = SimpleNamespace(image_size=64, num_maskmem=3, max_object_pointers_in_encoder=4)
        self.clicks: dict[int, list[list[float]]] = {}
        self.answers = answers or (lambda index: 1.0)

    def eval(self):
        return self

    def to(self, device):
        return self

    def __call__(self, *, inference_session, frame_idx, frame):
        assert frame.shape == (1, 3, 64, 64)
        inference_session.add_new_frame(frame, frame_idx)
        given = inference_session.point_inputs_per_obj[0].get(frame_idx)
        kind = "non_cond_frame_outputs"
        if inference_session.obj_with_new_inputs:
            self.clicks[frame_idx] = given["point_coords"][0, 0].tolist()
            inference_session.obj_with_new_inputs.clear()
            kind = "cond_frame_outputs"
        inference_session.output_dict_per_obj[0][kind][frame_idx] = {}
        self.session = inference_session
        return SimpleNamespace(pred_masks=torch.full((1, 1, 16, 16), self.answers(frame_idx)))


def test_the_published_model_gives_a_mask_of_the_frames_size(tiny_model):
    segment = sam2.Segmenter(tiny_model)
    masks = [segment(frame, body) for frame, body in frames(3)]
    assert [mask.shape for mask in masks] == [(64, 96)] * 3
    assert all(mask.dtype == bool for mask in masks)


def test_memory_does_not_grow_with_the_video(tiny_model, monkeypatch):
    monkeypatch.setattr(sam2, "EVERY", 2)
    segment = sam2.Segmenter(tiny_model)
    for frame, body in frames(16):
        segment(frame, body)
    outputs = segment._session.output_dict_per_obj[0]
    assert not segment._session.processed_frames
    assert len(outputs["non_cond_frame_outputs"]) <= 4
    assert sorted(outputs["cond_frame_outputs"])[0] == 0
    assert len(outputs["cond_frame_outputs"]) == sam2.CLICKED_KEPT


def test_forgetting_changes_nothing_that_is_found(tiny_model, monkeypatch):
    """What is dropped is what the model would not have looked at (clicks on the first frame only)."""
    found = []
    kept = sam2.Segmenter(tiny_model)
    monkeypatch.setattr(kept, "_forget", lambda index: None)
    dropped = sam2.Segmenter(tiny_model)
    watching = tiny_model.register_forward_hook(lambda model, given, result: found.append(result.pred_masks))
    for index, (frame, body) in enumerate(frames(9)):
        body[:, 2] *= index == 0
        kept(frame, body)
        dropped(frame, body)
    watching.remove()
    assert len(kept._session.output_dict_per_obj[0]["non_cond_frame_outputs"]) == 8
    assert all(torch.equal(*pair) for pair in zip(found[::2], found[1::2], strict=True))


def test_clicks_are_the_eight_joints_in_the_models_pixels():
    model = Watched()
    (frame, body), *_ = frames(1)
    sam2.Segmenter(model)(frame, body)
    wanted = body[sam2.CLICKED, :2] * (64 / 96, 64 / 64)
    assert np.allclose(model.clicks[0], wanted, atol=1e-4)


def test_joints_that_are_not_seen_are_not_clicked_on():
    model = Watched()
    (frame, body), *_ = frames(1)
    body[sam2.CLICKED[0], 2] = 0.4
    body[sam2.CLICKED[1], 0] = -5
    sam2.Segmenter(model)(frame, body)
    assert len(model.clicks[0]) == 6


def test_until_somebody_is_seen_masks_are_empty():
    model = Watched()
    segment = sam2.Segmenter(model)
    masks = []
    for index, (frame, body) in enumerate(frames(4)):
        if index < 2:
            body[:, 2] = 0.1
        masks.append(segment(frame, body).any())
    assert masks == [False, False, True, True]
    assert list(model.clicks) == [2]


def test_clicks_are_repeated_from_time_to_time_and_when_the_person_is_lost(monkeypatch):
    monkeypatch.setattr(sam2, "EVERY", 5)
    model = Watched(lambda index: -1.0 if index == 2 else 1.0)
    segment = sam2.Segmenter(model)
    for frame, body in frames(9):
        segment(frame, body)
    assert list(model.clicks) == [0, 3, 8]


def test_a_saved_model_is_loaded(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert sam2.check_folder(tmp_path) == tmp_path
    segment = sam2.load_segmenter(tmp_path)
    (frame, body), *_ = frames(1)
    assert segment(frame, body).shape == (64, 96)


def test_a_model_with_tensors_missing_is_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["no_object_pointer"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="no_object_pointer") as caught:
        sam2.load_segmenter(tmp_path)
    assert caught.value.code == "E4016"


@pytest.mark.parametrize("folder", [None, "empty"])
def test_a_missing_model_is_named_with_size_and_repository(tmp_path, folder):
    with pytest.raises(InputError, match=r"0\.9 GB.*facebook/sam2-hiera-large") as caught:
        sam2.check_folder(tmp_path / folder if folder else None)
    assert caught.value.code == "E4001"
