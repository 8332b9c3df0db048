"""The frozen encoders: a prompt to text features (UMT5), a picture to picture features (CLIP's visual
tower), a sound to what is heard (wav2vec2).

Their modules come from `transformers`, built from our own configs (never from a hub name) and loaded by our own loader:

    with torch.device("meta"):
        model = build_umt5(TextConfig())
    model.load_state_dict(weights, assign=True)     # every name of the checkpoint and no other
    features = encode_text(model, Tokenizer(folder), ["a cat"], text_len=512)

Both builders take out of the module what `transformers` adds beside the checkpoint (a tied copy of the embedding, an
index buffer), so nothing is left on the meta device after such a load.  Tensor names: `checkpoint/names.py`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanloom.errors import InputError
from wanloom.models.config import AudioConfig, ClipConfig, TextConfig

EOS = "</s>"
PAD_ID = 0
LARGEST_TOKENIZER = 128 * 2**20  # bytes; the published tokenizer.json has 17 MB

# What CLIP was trained with (open_clip, ViT-H-14 trained with XLM-RoBERTa).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------- text


def clean(text: str) -> str:
    """Mend mojibake, resolve HTML entities (twice: `&amp;lt;` occurs), collapse white space: as the reference."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """UMT5's tokenizer: text -> ids ending in </s>, from a `tokenizer.json` or a folder that has one.

    Raises InputError E4030 when the file is missing, damaged or too large to be a tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        self._tokenizer = _read_tokenizer(path)
        # A saved file may carry the padding and truncation of whoever saved it.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        eos = self._tokenizer.token_to_id(EOS)
        if eos is None:
            raise InputError("E4030", f"{path.name}: the tokenizer has no {EOS} token, so it is not UMT5's.")
        self.eos_id: int = eos

    def ids(self, text: str) -> list[int]:
        """All ids of the cleaned text and the closing </s>, however many they are."""
        # The closing token is set here and not by the file's post-processor, which a converted tokenizer may lack.
        encoded: list[int] = self._tokenizer.encode(clean(text), add_special_tokens=False).ids
        return [*encoded, self.eos_id]

    def count(self, text: str) -> int:
        """How many tokens the text has, </s> included; more than `text_len` are cut off by a call."""
        return len(self.ids(text))

    def unknown(self, text: str) -> list[str]:
        """The pieces of the text that the vocabulary does not have, in their order."""
        text = clean(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = self._tokenizer.token_to_id("<unk>")
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end] for token, (start, end) in spans if token == unknown]

    def __call__(self, texts: str | Sequence[str], text_len: int) -> tuple[Tensor, Tensor]:
        """Texts -> ids and mask, both [B, text_len] long: at most text_len - 1 tokens, then </s>, then padding 0."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), text_len), PAD_ID)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = self.ids(text)
            tokens = tokens if len(tokens) <= text_len else [*tokens[: text_len - 1], self.eos_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask


def _read_tokenizer(path: Path) -> Any:
    """tokenizers.Tokenizer of a file; the library has no types."""
    import tokenizers

    if not path.is_file():
        raise InputError(
            "E4030", f"{path.name}: no such file in {path.parent.name or '.'}; expected the tokenizer.json."
        )
    size = path.stat().st_size
    if size > LARGEST_TOKENIZER:
        raise InputError(
            "E4030", f"{path.name}: {size} bytes is too large for a tokenizer (at most {LARGEST_TOKENIZER})."
        )
    try:
        text = path.read_bytes().decode()
        json.loads(text)
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception; every cause means the same here
        raise InputError("E4030", f"{path.name}: not a readable tokenizer ({str(error)[:120]}).") from error


def build_umt5(config: TextConfig) -> Any:
    """transformers' UMT5EncoderModel of these sizes, in eval mode, with one embedding `shared.weight`.

    Its state_dict has one tensor for each of the official checkpoint.  Build it under `torch.device("meta")`.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    model: Any = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD_ID,
        )
    )
    # The stack's own embedding is a second name of the same tensor; keep it as a plain reference so that loading
    # with assign, which replaces parameters, cannot leave the two apart.
    del model.encoder.embed_tokens
    model.encoder.__dict__["embed_tokens"] = model.shared
    return model.eval()


@torch.no_grad()
def encode_text(model: Any, tokenizer: Tokenizer, prompts: Sequence[str], text_len: int) -> Tensor:
    """Text features [B, text_len, dim] in the dtype of the model, zero beyond the end of each prompt.

    Each prompt runs alone and at its own length: the result does not depend on its company, and is what the reference
    gets at full length, where the padding is masked (UMT5 has no absolute positions).
    """
    rows = []
    for prompt in prompts:
        ids, mask = tokenizer(prompt, text_len)
        length = int(mask.sum())
        out = model(input_ids=ids[:, :length].to(model.shared.weight.device))
        rows.append(F.pad(out.last_hidden_state, (0, 0, 0, text_len - length)))
    return torch.cat(rows)


# ---------------------------------------------------------------- pictures


def build_clip(config: ClipConfig) -> Any:
    """The visual tower of transformers' CLIPVisionModel in these sizes, in eval mode.  Build it on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model: Any = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            projection_dim=config.projection,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image,
            patch_size=config.patch,
            hidden_act="gelu",
            layer_norm_eps=config.eps,
        )
    )
    model = getattr(model, "vision_model", model)  # older releases of transformers wrap the tower once more
    del model.embeddings.position_ids  # 0..n-1, in no checkpoint: it would stay on the meta device
    return model.eval()


@torch.no_grad()
def encode_image(model: Any, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> features [B, 257, 1280], without a gradient: see `image_features`."""
    return image_features(model, images)


def image_features(model: Any, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> features [B, 257, 1280]: what enters the tower's last block.

    The picture is squeezed to a square (224 x 224) by bicubic interpolation without antialiasing, as the reference
    does.  The last block and the norm after it are not used.
    """
    embed = model.embeddings
    weight = embed.patch_embedding.weight
    size = (embed.image_size, embed.image_size)
    images = F.interpolate(images.float(), size, mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, std = (images.new_tensor(c)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    patches = embed.patch_embedding(((images - mean) / std).to(weight)).flatten(2).transpose(1, 2)
    first = embed.class_embedding.expand(len(images), 1, -1)
    x: Tensor = model.pre_layrnorm(torch.cat((first, patches), 1) + embed.position_embedding.weight)
    layers: nn.ModuleList = model.encoder.layers
    for layer in layers[:-1]:
        x = layer(x, None)
    return x


# ---------------------------------------------------------------- sound


def build_wav2vec2(config: AudioConfig) -> Any:
    """transformers' Wav2Vec2Model in these sizes, in eval mode.  Build it on the meta device."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    model: Any = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_attention_heads=config.heads,
            num_hidden_layers=config.layers,
            conv_dim=list(config.conv_dim),
            conv_kernel=list(config.conv_kernel),
            conv_stride=list(config.conv_stride),
            num_conv_pos_embeddings=config.positions,
            num_conv_pos_embedding_groups=config.groups,
            layer_norm_eps=config.eps,
            conv_bias=True,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            mask_time_prob=0.0,  # no masking, hence no embedding for what is masked
            mask_feature_prob=0.0,
        )
    )
    return model.eval()


def normalise(wave: Tensor) -> Tensor:
    """A sound [n] with zero mean and unit variance, as the published processor makes it."""
    return (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + 1e-7)


@torch.no_grad()
def encode_audio(model: Any, wave: Tensor, *, last_normed: bool = True, normalised: bool = False) -> Tensor:
    """`hidden_states` of a sound, normalised first if it is not `normalised`; without gradients."""
    return hidden_states(model, wave if normalised else normalise(wave), last_normed=last_normed)


def hidden_states(model: Any, wave: Tensor, *, last_normed: bool = True) -> Tensor:
    """A normalised mono wave [n] at 16 kHz -> all hidden states [layers + 1, T, dim] at about 50 a second.

    The first state is what enters the first layer.  The final norm is applied to the last one alone, as transformers 4
    did, with which s2v was trained; transformers 5 leaves it out of the states (last_normed=False), and so did who ran
    the reference with it.
    """
    before: list[Tensor] = []
    handle = model.encoder.layer_norm.register_forward_pre_hook(lambda module, given: before.append(given[0]))
    out = model(wave[None].to(model.encoder.layer_norm.weight), output_hidden_states=True)
    handle.remove()
    states: tuple[Tensor, ...] = out.hidden_states
    return torch.cat((*states[:-1], out.last_hidden_state if last_normed else before[0]))
