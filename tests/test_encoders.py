"""Text and picture encoders: against the reference, against transformers, and what loading leaves behind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from wanloom.encoders import CLIP_MEAN, CLIP_STD, Tokenizer, build_clip, build_umt5, clean, encode_image, encode_text
from wanloom.errors import InputError
from wanloom.models.config import ClipConfig, TextConfig

TEXT = TextConfig(dim=48, ffn_dim=96, heads=3, head_dim=16, layers=3, vocab=34)
CLIP = ClipConfig(dim=48, ffn_dim=96, heads=3, layers=4, projection=16, image=56)
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "runs", ",", "猫"]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def tokenizer_json(*, post_processor: bool = True, vocabulary: list[str] = WORDS, **settings: Any) -> str:
    """A word-level tokenizer in the form of the published file."""
    added = [{"id": i, "content": vocabulary[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in range(3)]  # fmt: skip
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(vocabulary)}, "unk_token": "<unk>"}
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": template if post_processor else None,
            "decoder": None, "model": model, **settings,
        }
    )  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    return Tokenizer(tmp_path)


# ---------------------------------------------------------------- cleaning and tokens


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\n red \t cat ", "a red cat"),
        ("cats &amp;amp; dogs &lt;b&gt;", "cats & dogs <b>"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("", ""),
        ("　猫　", "猫"),
    ],
)
def test_text_is_cleaned_as_the_reference_does(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def test_ids_end_in_eos_and_are_padded_with_zero(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["a  red cat", ""], 6)
    assert ids.tolist() == [[3, 4, 5, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokenizer("a", 4)[0].shape == (1, 4)


def test_a_long_text_keeps_its_eos_and_its_count_is_known(tokenizer: Tokenizer) -> None:
    text = "a cat runs , a cat runs"
    assert tokenizer(text, 4)[0].tolist() == [[3, 5, 6, 1]]
    assert tokenizer.count(text) == 8
    assert tokenizer(text, 8)[0].tolist() == [[3, 5, 6, 7, 3, 5, 6, 1]]  # as many as fit: nothing is cut


@pytest.mark.parametrize("settings", [
    {"post_processor": False},
    {"padding": {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<pad>"},
     "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
], ids=["no post-processor", "saved with padding and truncation"])  # fmt: skip
def test_a_file_saved_otherwise_gives_the_same_ids(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(**settings))
    assert Tokenizer(tmp_path / "tokenizer.json").ids("a red cat") == [3, 4, 5, 1]


def test_words_outside_the_vocabulary_are_named(tokenizer: Tokenizer) -> None:
    assert tokenizer.unknown("a purple  cat , quickly") == ["purple", "quickly"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", tokenizer_json().encode()[:-200], b"[" * 100_000,
     tokenizer_json(vocabulary=["<pad>", "<end>", "<unk>"]).encode()],
    ids=["empty", "cut", "not text", "list", "no model", "truncated", "deep", "no eos"],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json") as caught:
        Tokenizer(tmp_path)
    assert caught.value.code == "E4030"


def test_a_missing_or_huge_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Tokenizer(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)  # a hole: takes no disk
    with pytest.raises(InputError, match="too large"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------- UMT5


def plain_umt5(config: TextConfig) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(
        vocab_size=config.vocab, d_model=config.dim, d_kv=config.head_dim, d_ff=config.ffn_dim,
        num_layers=config.layers, num_heads=config.heads, feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts with some tables at zero
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def loaded(builder: Any, config: Any, weights: dict[str, Tensor]) -> Any:
    """What our loader does: build on meta, assign, nothing left over."""
    with torch.device("meta"):
        model = builder(config)
    model.load_state_dict(weights, assign=True)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert left == []
    assert not model.training
    return model


@pytest.mark.parametrize("prompts", [["a red cat runs"], ["", "a cat", "猫 , a red cat runs runs runs"]])
def test_text_features_are_transformers_at_full_length(prompts: list[str], tokenizer: Tokenizer) -> None:
    model = plain_umt5(TEXT)
    weights = {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    got = encode_text(loaded(build_umt5, TEXT, weights), tokenizer, prompts, 20)
    ids, mask = tokenizer(prompts, 20)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert got.shape == (len(prompts), 20, 48)
    assert relative(got, expected) <= 1e-5
    assert got[mask == 0].abs().max() == 0


def test_text_features_do_not_depend_on_the_company(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = build_umt5(TEXT)
    together = encode_text(model, tokenizer, ["a cat", "a red cat runs , a cat"], 12)
    assert torch.equal(together[:1], encode_text(model, tokenizer, ["a cat"], 12))


def test_the_embedding_is_one_tensor_after_loading_and_trains_as_one() -> None:
    torch.manual_seed(0)
    weights = {name: tensor.clone() for name, tensor in build_umt5(TEXT).state_dict().items()}
    model = loaded(build_umt5, TEXT, weights)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert [name for name in weights if "embed" in name] == []
    model(input_ids=torch.tensor([[3, 1]])).last_hidden_state.sum().backward()
    assert model.shared.weight.grad is not None


def test_umt5_xxl_has_the_published_count() -> None:
    with torch.device("meta"):
        model = build_umt5(TextConfig())
    assert len(model.state_dict()) == 242
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336


@pytest.mark.parametrize(("ckpt", "key", "prompt"), [
    ("Wan2.2-T2V-A14B", "t5_context", "a white cat runs , quickly . 猫"),
    ("Wan2.2-TI2V-5B", "t5_ti2v", "a dog"),
])  # fmt: skip
def test_text_features_are_the_references(ckpt: str, key: str, prompt: str, golden: Path) -> None:
    spec = importlib.util.spec_from_file_location("materialize", golden / "materialize.py")
    assert spec is not None and spec.loader is not None
    materialize: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(materialize)
    entry = json.loads((golden / "checkpoints.json").read_text())[ckpt]["models_t5_umt5-xxl-enc-bf16.pth"]
    weights = materialize.state_dict(entry["tensors"], entry["salt"])
    renamed = {
        "shared.weight": weights["token_embedding.weight"],
        "encoder.final_layer_norm.weight": weights["norm.weight"],
    }
    for i in range(3):
        ours, theirs = f"encoder.block.{i}.layer", f"blocks.{i}"
        for letter in "qkvo":
            renamed[f"{ours}.0.SelfAttention.{letter}.weight"] = weights[f"{theirs}.attn.{letter}.weight"]
        for target, source in (
            ("0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
            ("0.layer_norm", "norm1"),
            ("1.layer_norm", "norm2"),
            ("1.DenseReluDense.wi_0", "ffn.gate.0"),
            ("1.DenseReluDense.wi_1", "ffn.fc1"),
            ("1.DenseReluDense.wo", "ffn.fc2"),
        ):
            renamed[f"{ours}.{target}.weight"] = weights[f"{theirs}.{source}.weight"]
    expected = load_file(golden / "components.safetensors")[key]
    got = encode_text(loaded(build_umt5, TEXT, renamed), Tokenizer(golden / "tokenizer"), [prompt], 512)[0]
    assert relative(got[: len(expected)], expected) <= 1e-5
    assert got[len(expected) :].abs().max() == 0


# ---------------------------------------------------------------- CLIP


def plain_clip(config: ClipConfig) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, image_size=config.image, patch_size=config.patch, hidden_act="gelu",
        projection_dim=config.projection,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prepared(images: Tensor, size: int) -> Tensor:
    images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False).mul(0.5).add(0.5)
    return (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


@pytest.mark.parametrize("size", [(56, 56), (40, 70), (128, 96)])
def test_picture_features_are_transformers_penultimate_hidden_state(size: tuple[int, int]) -> None:
    model = plain_clip(CLIP)
    ours = loaded(build_clip, CLIP, getattr(model, "vision_model", model).state_dict())
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        hidden = model(pixel_values=prepared(images, CLIP.image), output_hidden_states=True).hidden_states
    got = encode_image(ours, images)
    assert got.shape == (2, 17, 48)
    assert relative(got, hidden[-2]) <= 1e-5
    assert relative(got, hidden[-1]) > 1e-3  # the last block would be seen


def test_the_published_tower_gives_257_tokens_of_1280() -> None:
    with torch.device("meta"):
        model = build_clip(ClipConfig())
        features = encode_image(model, torch.zeros(1, 3, 64, 96))
    assert features.shape == (1, 257, 1280)
    # 632,076,800 in the published file, less the projection head of 1280 x 1024 that nothing reads
    assert sum(p.numel() for p in model.parameters()) == 632_076_800 - 1280 * 1024
    assert list(model.named_buffers()) == []
