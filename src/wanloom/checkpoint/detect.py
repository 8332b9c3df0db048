"""What a checkpoint is: sizes from tensor shapes, config.json where there is one, and the released models it can be.

Sizes are facts of the tensors, so a small checkpoint in a published layout loads like a large one.  Only what shapes
cannot say is taken from config.json or a default: how many heads share the width, the text length, epsilons.  Where
config.json and tensors disagree, that is an error, and so is every tensor that the sizes do not explain.

Errors (InputError, exit 4): E4013 tensors missing or too many, E4016 / E4017 / E4020 another model than was asked for,
E4021 a bad config key, E4022 a key that would load code, E4023 impossible sizes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from math import isqrt, prod
from pathlib import Path
from typing import Any

from wanloom.checkpoint.documents import check_keys, parse_json, read_json
from wanloom.checkpoint.names import OPTIONAL
from wanloom.checkpoint.shapes import Shape, audio_shapes, clip_shapes, dit_shapes, text_shapes, vae_shapes
from wanloom.checkpoint.weights import CONFIG, KINDS, Weights, few
from wanloom.errors import InputError, WanloomWarning
from wanloom.models.config import (
    VAE_21,
    VAE_22,
    AnimateConfig,
    AudioConfig,
    ClipConfig,
    DiTConfig,
    SpeechConfig,
    TextConfig,
    VaeConfig,
)
from wanloom.variants import VARIANTS, Variant

Config = DiTConfig | VaeConfig | TextConfig | ClipConfig | AudioConfig

# No released model exceeds a tenth of these; they keep a forged config from asking for all memory (B087).
MAX_LAYERS = 1000
MAX_WIDTH = 1 << 20
HEAD_WIDTH = 128  # of every released transformer
FACE_EVERY = 5  # animate-14B looks at the face after blocks 0, 5, 10 ...; its config.json does not say so

# ---------------------------------------------------------------- config.json

_ANY: tuple[type, ...] = (int, float, str, bool, list, dict, type(None))
_INT, _NUM, _STR, _BOOL, _LIST = (int,), (float,), (str,), (bool,), (list,)
_COMMON: dict[str, tuple[type, ...]] = {
    "_class_name": _STR, "_diffusers_version": _STR, "_name_or_path": _STR, "architectures": _LIST, "model_type": _STR,
    "transformers_version": _STR, "torch_dtype": (str, type(None)), "dtype": (str, type(None)),
}  # fmt: skip

# Key of config.json -> (types, field of our config or ""; "speech.layers" is a field of its field).  A key without a
# field is known and without effect here.
DIT_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "dim": (_INT, "dim"), "eps": (_NUM, "eps"), "ffn_dim": (_INT, "ffn_dim"), "freq_dim": (_INT, "freq_dim"),
    "in_dim": (_INT, "in_channels"), "num_heads": (_INT, "heads"), "num_layers": (_INT, "layers"),
    "out_dim": (_INT, "out_channels"), "text_len": (_INT, "text_len"), "text_dim": (_INT, "text_dim"),
    "patch_size": (_LIST, "patch"), "qk_norm": ((bool, str), ""), "cross_attn_norm": (_BOOL, ""),
    "window_size": (_LIST, ""), "num_attention_heads": (_INT, "heads"), "attention_head_dim": (_INT, ""),
    "in_channels": (_INT, "in_channels"), "out_channels": (_INT, "out_channels"),
    "image_dim": ((int, type(None)), "image_dim"), "added_kv_proj_dim": ((int, type(None)), ""),
    "rope_max_seq_len": (_INT, ""), "pos_embed_seq_len": ((int, type(None)), "image_positions"),
    # s2v
    "audio_inject_layers": (_LIST, "speech.layers"), "audio_dim": (_INT, "speech.audio_dim"),
    "cond_dim": (_INT, "speech.channels"), "num_audio_token": (_INT, "speech.tokens"),
    "motion_frames": (_INT, ""), "motion_token_num": (_INT, ""), "zero_init": (_BOOL, ""),
    "enable_adain": (_BOOL, ""), "adain_mode": (_STR, ""), "add_last_motion": (_BOOL, ""),
    "enable_framepack": (_BOOL, ""), "framepack_drop_mode": (_STR, ""), "enable_motioner": (_BOOL, ""),
    "enable_tsm": (_BOOL, ""), "trainable_token_pos_emb": (_BOOL, ""), "zero_timestep": (_BOOL, ""),
    # animate; the first key is ours
    "face_adapter_layers": (_LIST, "animate.layers"), "motion_encoder_dim": (_INT, "animate.motion_dim"),
    "use_context_parallel": (_BOOL, ""), "use_img_emb": (_BOOL, ""),
}  # fmt: skip
VAE_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "base_dim": (_INT, "dim"), "decoder_base_dim": ((int, type(None)), ""), "z_dim": (_INT, "z"),
    "dim_mult": (_LIST, "multipliers"), "num_res_blocks": (_INT, "blocks"), "attn_scales": (_LIST, ""),
    "temperal_downsample": (_LIST, "temporal"), "dropout": (_NUM, ""), "latents_mean": (_LIST, "mean"),
    "latents_std": (_LIST, "std"), "is_residual": (_BOOL, "residual"), "in_channels": (_INT, ""),
    "out_channels": (_INT, ""), "patch_size": ((int, type(None)), ""), "scale_factor_temporal": (_INT, ""),
    "scale_factor_spatial": (_INT, ""), "clip_output": (_BOOL, ""),
}  # fmt: skip
TEXT_IDLE = (
    "classifier_dropout", "decoder_start_token_id", "dense_act_fn", "dropout_rate", "eos_token_id", "feed_forward_proj",
    "initializer_factor", "is_encoder_decoder", "is_gated_act", "num_decoder_layers", "output_past", "pad_token_id",
    "scalable_attention", "tie_word_embeddings", "tokenizer_class", "use_cache", "is_decoder", "bos_token_id",
)  # fmt: skip
TEXT_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "d_model": (_INT, "dim"), "d_ff": (_INT, "ffn_dim"), "num_heads": (_INT, "heads"), "d_kv": (_INT, "head_dim"),
    "num_layers": (_INT, "layers"), "vocab_size": (_INT, "vocab"), "relative_attention_num_buckets": (_INT, "buckets"),
    "relative_attention_max_distance": (_INT, "max_distance"), "layer_norm_epsilon": (_NUM, "eps"),
    **dict.fromkeys(TEXT_IDLE, (_ANY, "")),
}  # fmt: skip
CLIP_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "hidden_size": (_INT, "dim"), "intermediate_size": (_INT, "ffn_dim"), "num_attention_heads": (_INT, "heads"),
    "num_hidden_layers": (_INT, "layers"), "patch_size": (_INT, "patch"), "image_size": (_INT, "image"),
    "layer_norm_eps": (_NUM, "eps"), "projection_dim": (_INT, "projection"), "hidden_act": (_STR, ""),
    "num_channels": (_INT, ""), "attention_dropout": (_NUM, ""), "dropout": (_NUM, ""),
    "initializer_factor": (_NUM, ""), "initializer_range": (_NUM, ""),
}  # fmt: skip
AUDIO_IDLE = (
    "activation_dropout", "adapter_attn_dim", "adapter_kernel_size", "adapter_stride", "apply_spec_augment",
    "attention_dropout", "bos_token_id", "classifier_proj_size", "codevector_dim", "contrastive_logits_temperature",
    "ctc_loss_reduction", "ctc_zero_infinity", "diversity_loss_weight", "eos_token_id", "feat_extract_dropout",
    "feat_proj_dropout", "feat_quantizer_dropout", "final_dropout", "gradient_checkpointing", "hidden_dropout",
    "hidden_dropout_prob", "initializer_range", "layerdrop", "mask_channel_length", "mask_channel_min_space",
    "mask_channel_other", "mask_channel_prob", "mask_channel_selection", "mask_feature_length",
    "mask_feature_min_masks", "mask_feature_prob", "mask_time_length", "mask_time_min_masks", "mask_time_min_space",
    "mask_time_other", "mask_time_prob", "mask_time_selection", "num_adapter_layers", "num_codevector_groups",
    "num_codevectors_per_group", "num_feat_extract_layers", "num_negatives", "output_hidden_size", "pad_token_id",
    "proj_codevector_dim", "tdnn_dilation", "tdnn_dim", "tdnn_kernel", "use_weighted_layer_sum", "vocab_size",
    "xvector_output_dim",
)  # fmt: skip
AUDIO_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "hidden_size": (_INT, "dim"), "intermediate_size": (_INT, "ffn_dim"), "num_attention_heads": (_INT, "heads"),
    "num_hidden_layers": (_INT, "layers"), "conv_dim": (_LIST, "conv_dim"), "conv_kernel": (_LIST, "conv_kernel"),
    "conv_stride": (_LIST, "conv_stride"), "num_conv_pos_embeddings": (_INT, "positions"),
    "num_conv_pos_embedding_groups": (_INT, "groups"), "layer_norm_eps": (_NUM, "eps"),
    "do_stable_layer_norm": (_BOOL, ""), "feat_extract_norm": (_STR, ""), "feat_extract_activation": (_STR, ""),
    "hidden_act": (_STR, ""), "conv_bias": (_BOOL, ""), "add_adapter": (_BOOL, ""),
    **dict.fromkeys(AUDIO_IDLE, (_ANY, "")),
}  # fmt: skip
KEYS = {"dit": DIT_KEYS, "vae": VAE_KEYS, "text": TEXT_KEYS, "clip": CLIP_KEYS, "audio": AUDIO_KEYS}
# Fields that shapes decide as well; config.json may repeat them, not change them.
FREE = {
    "dit": ("eps", "heads", "text_len", "speech.layers", "animate.layers"),
    "vae": ("mean", "std"),
    "text": ("eps", "max_distance"),
    "clip": ("eps", "heads", "projection"),
    "audio": ("eps", "heads", "conv_stride"),
}
# Forms that we do not build: key -> the only values with a meaning here.
FIXED: dict[str, dict[str, tuple[object, ...]]] = {
    "dit": {
        "qk_norm": (True, "rms_norm_across_heads"), "cross_attn_norm": (True,), "window_size": ([-1, -1],),
        "enable_adain": (True,), "adain_mode": ("attn_norm",), "add_last_motion": (True,), "enable_framepack": (True,),
        "framepack_drop_mode": ("padd",), "enable_motioner": (False,), "enable_tsm": (False,),
        "trainable_token_pos_emb": (False,), "zero_timestep": (True,), "motion_frames": (73,),
        "use_img_emb": (True,),
    },
    "vae": {"attn_scales": ([],), "dropout": (0, 0.0)},
    "text": {"feed_forward_proj": ("gated-gelu",), "dense_act_fn": ("gelu_new",)},
    "clip": {"hidden_act": ("gelu",), "num_channels": (3,)},
    "audio": {
        "hidden_act": ("gelu",), "feat_extract_activation": ("gelu",), "feat_extract_norm": ("layer",),
        "do_stable_layer_norm": (True,), "conv_bias": (True,), "add_adapter": (False,),
    },
}  # fmt: skip


def given_sizes(weights: Weights) -> dict[str, Any]:
    """What the files say of themselves beside their tensors: config.json, and what `convert` put into the headers.

    Errors: E4021 when the two disagree, and those of `read_config`.
    """
    note, file = weights.metadata.get(CONFIG), weights.config_file
    out = read_config(weights.where, parse_json(note.encode(), weights.where), weights.kind) if note is not None else {}
    if file is None:
        return out
    beside = read_config(file, read_json(file, limit=2**20), weights.kind)
    for name, value in beside.items():
        if out.get(name, value) != value:
            raise InputError("E4021", f"{file}: {name} is {_plain(value)}, {weights.where} says {_plain(out[name])}.")
    return out | beside


def read_config(file: Path, document: object, kind: str) -> dict[str, Any]:
    """A model's config.json under the names of our config's fields.  Errors: E4021, E4023."""
    keys = KEYS[kind]
    schema = _COMMON | {key: types for key, (types, _) in keys.items()}
    values = check_keys(file, document, schema)
    for key, allowed in FIXED[kind].items():
        if key in values and values[key] not in allowed:
            raise InputError("E4021", f"{file}: {key}: got {values[key]!r}, this engine builds {allowed[0]!r}.")
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = keys[key][1] if key in keys else ""
        if name:
            out[name] = tuple(value) if isinstance(value, list) else value
    check_sizes(file, out)
    dim, heads = out.get("dim"), out.get("heads")
    if kind in ("dit", "clip", "audio") and dim and heads and dim % heads:
        raise InputError("E4023", f"{file}: dim {dim} cannot be shared by {heads} heads.")
    return out


def check_sizes(file: Path, values: Mapping[str, Any]) -> None:
    """E4023 for sizes that no model has: zero, negative, or enough to ask for all memory."""
    for name, value in values.items():
        limit = MAX_LAYERS if name == "layers" else MAX_WIDTH
        for number in value if isinstance(value, tuple) else (value,):
            least = 0 if name in ("speech.layers", "animate.layers") else 1
            if type(number) is int and name != "temporal" and not least <= number <= limit:
                raise InputError("E4023", f"{file}: {name} is {number:.6g}, expected {least} to {limit}.")
            if name in ("eps", "std") and not (isinstance(number, int | float) and number > 0):
                raise InputError("E4023", f"{file}: {name} is {number!r}, expected a positive number.")


# ---------------------------------------------------------------- sizes from shapes


def config_of(weights: Weights) -> Config:
    """The sizes of a model from its tensors and config.json, every tensor accounted for.  Errors: see the module."""
    foreign = FOREIGN_MODELS if weights.kind == "dit" else {}
    for sign, what in foreign.items():
        if any(sign in name for name in weights.tensors):
            raise InputError("E4016", f"{weights.where}: this is {what}, which this version does not run.")
    given = given_sizes(weights)
    config = _build(weights.kind, weights.where, weights.shapes, given)
    check_sizes(weights.where, {field.name: getattr(config, field.name) for field in fields(config)})
    _agree(weights, given, config)
    expected = READERS[weights.kind][1](config)
    _account(weights.where, KINDS[weights.kind], weights.shapes, expected)
    for name, source in weights.tensors.items():
        if source.shape != expected[name]:
            entry = source.entries[0]
            raise InputError(
                "E4007",
                f"{entry.file}: tensor {entry.name}: shape {list(entry.shape)} does not fit the other tensors; "
                f"{name} should be {list(expected[name])}.",
            )
    return config


def config_from(kind: str, path: Path, shapes: Mapping[str, Shape], config: Config | None = None) -> Config:
    """The sizes of a model in memory; a config that is given must explain every tensor.  Errors: E4007, E4013."""
    known = _build(kind, path, shapes, {}) if config is None else config
    expected = READERS[kind][1](known)
    _account(path, KINDS[kind], shapes, expected)
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise InputError("E4007", f"{path}: tensor {name}: shape {list(shape)}, its config has {expected[name]}.")
    return known


def _build(kind: str, path: Path, shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> Config:
    try:
        config: Config = READERS[kind][0](shapes, given)
    except InputError as error:
        raise InputError(error.code, f"{path}: {error.message}") from error
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
        what = f" ({error.args[0]})" if isinstance(error, KeyError) else ""
        raise InputError(
            "E4013", f"{path}: not a whole {KINDS[kind]}: a tensor that tells its sizes is missing{what}."
        ) from error
    return config


def _account(path: Path, what: str, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """E4013 for tensors too few or too many."""
    missing = [name for name in expected if name not in shapes and name not in OPTIONAL]
    extra = [name for name in shapes if name not in expected]
    if missing:
        raise InputError("E4013", f"{path}: {len(missing)} tensors of the {what} are missing: {few(missing)}.")
    if extra:
        raise InputError("E4013", f"{path}: {len(extra)} tensors that this {what} does not have: {few(extra)}.")


def _agree(weights: Weights, given: Mapping[str, Any], config: Config) -> None:
    """config.json may fill in, not contradict."""
    for name, value in given.items():
        found = _field(config, name)
        if name not in FREE[weights.kind] and found != value:
            file = weights.config_file or "its own note"
            raise InputError(
                "E4021", f"{weights.where}: {name} is {_plain(found)} by the tensors, {_plain(value)} by {file}."
            )


def _field(config: Config, name: str) -> Any:
    """A field, or a field of a field; None where the model has no such part."""
    value: Any = config
    for word in name.split("."):
        value = getattr(value, word, None)
    return value


def _plain(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _count(shapes: Mapping[str, Shape], template: str) -> int:
    """How many numbers i from 0 up have `template.format(i)`, names in any order."""
    count = 0
    while template.format(count) in shapes:
        count += 1
    return count


def _dit(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> DiTConfig:
    first = shapes["patch_embedding.weight"]
    dim, channels = first[0], first[1]
    patch = (first[2], first[3], first[4])
    image = shapes.get("img_emb.proj.1.weight")
    positions = shapes.get("img_emb.emb_pos")
    heads = given.get("heads") or (dim // HEAD_WIDTH if dim % HEAD_WIDTH == 0 else 0)
    if heads < 1 or dim % heads:
        raise InputError(
            "E4023",
            f"dim {dim} is no multiple of {HEAD_WIDTH}: the heads cannot be told. Put num_heads in a config.json.",
        )
    return DiTConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        heads=heads,
        layers=_count(shapes, "blocks.{}.modulation"),
        in_channels=channels,
        out_channels=shapes["head.head.weight"][0] // prod(patch),
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=given.get("text_len", DiTConfig.text_len),
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch=patch,
        eps=given.get("eps", DiTConfig.eps),
        image_dim=image[1] if image else None,
        image_positions=positions[1] if positions else None,
        speech=_speech(shapes, given),
        animate=_animate(shapes, given),
    )


def _has(shapes: Mapping[str, Shape], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in shapes)


def _placed(shapes: Mapping[str, Shape], sign: str, layers: tuple[int, ...], verb: str, key: str) -> tuple[int, ...]:
    """`layers` when there are as many parts named `sign` and each has a block of its own.  Error: E4021."""
    count, blocks = _count(shapes, sign), _count(shapes, "blocks.{}.modulation")
    if len(layers) != count or len({i for i in layers if type(i) is int and i < blocks}) != count:
        raise InputError(
            "E4021",
            f"{count} of {blocks} blocks {verb}, {key} is {_plain(layers)}. Put the list in a config.json.",
        )
    return layers


def _speech(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> SpeechConfig | None:
    """The parts of s2v, where a transformer has them; after which blocks it hears stands in config.json alone."""
    if not _has(shapes, "casual_audio_encoder.", "audio_injector."):
        return None
    local = shapes["casual_audio_encoder.encoder.conv1_local.conv.weight"]
    layers = tuple(given.get("speech.layers", SpeechConfig.layers))
    layers = _placed(shapes, "audio_injector.injector.{}.q.weight", layers, "hear", "audio_inject_layers")
    quarter = shapes["casual_audio_encoder.encoder.conv1_global.conv.weight"][0]
    return SpeechConfig(
        audio_dim=local[1],
        audio_states=shapes["casual_audio_encoder.weights"][1],
        tokens=local[0] // quarter,
        layers=layers,
        channels=shapes["cond_encoder.weight"][1],
    )


def _animate(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> AnimateConfig | None:
    """The parts of animate, where a transformer has them.

    After which blocks it looks at the face is told by no tensor: every fifth, as published, unless config.json says.
    """
    if not _has(shapes, "pose_patch_embedding.", "motion_encoder.", "face_encoder.", "face_adapter."):
        return None
    convs = "motion_encoder.enc.net_app.convs"
    widths = [shapes[f"{convs}.0.0.weight"][0]]
    while (halved := shapes.get(f"{convs}.{len(widths)}.conv2.1.weight")) is not None:
        widths.append(halved[0])
    motion, directions = shapes["motion_encoder.dec.direction.weight"]
    face = shapes["face_encoder.conv2.conv.weight"][0]
    layers = tuple(given.get("animate.layers", face_layers(_count(shapes, "blocks.{}.modulation"))))
    sign = "face_adapter.fuser_blocks.{}.linear1_q.weight"
    return AnimateConfig(
        layers=_placed(shapes, sign, layers, "look at the face", "face_adapter_layers"),
        face_dim=face,
        tokens=shapes["face_encoder.conv1_local.conv.weight"][0] // face,
        channels=shapes["pose_patch_embedding.weight"][1],
        motion_dim=motion,
        directions=directions,
        widths=tuple(widths),
    )


def face_layers(blocks: int) -> tuple[int, ...]:
    """After which of its blocks the published model looks at the face."""
    return tuple(range(0, blocks, FACE_EVERY))


def _vae(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> VaeConfig:
    residual = "encoder.downsamples.0.downsamples.0.residual.0.gamma" in shapes
    dim = shapes["encoder.conv1.weight"][0]
    widths, temporal = _vae_stages(shapes, residual=residual)
    z = shapes["conv2.weight"][0]
    published = {row.z: row for row in (VAE_21, VAE_22)}.get(z)
    mean, std = given.get("mean"), given.get("std")
    if (mean is None or std is None) and published is not None:
        mean, std = published.mean, published.std
    if mean is None or std is None or len(mean) != z or len(std) != z:
        raise InputError("E4017", f"a VAE with {z} latent channels, expected {VAE_21.z} or {VAE_22.z}.")
    top = widths[-1][1] // dim
    return VaeConfig(
        z=z,
        dim=dim,
        decoder_dim=shapes["decoder.conv1.weight"][0] // max(top, 1),
        multipliers=tuple(width // dim for _, width in widths),
        blocks=widths[0][0],
        temporal=temporal,
        patch=isqrt(shapes["encoder.conv1.weight"][1] // 3),
        residual=residual,
        mean=tuple(mean),
        std=tuple(std),
    )


def _vae_stages(shapes: Mapping[str, Shape], *, residual: bool) -> tuple[list[tuple[int, int]], tuple[bool, ...]]:
    """(blocks, width) of each encoder stage, and which of the downsamplers between them halve time."""
    prefix = "encoder.downsamples"
    layers: list[str] = []
    if residual:
        for stage in range(_count(shapes, prefix + ".{}.downsamples.0.residual.0.gamma")):
            layers += _layers(shapes, f"{prefix}.{stage}.downsamples")
    else:
        layers = _layers(shapes, prefix)
    stages, temporal, blocks, width = [], [], 0, 0
    for layer in layers:
        if f"{layer}.resample.1.weight" in shapes:
            stages.append((blocks, width))
            temporal.append(f"{layer}.time_conv.weight" in shapes)
            blocks = 0
        else:
            blocks, width = blocks + 1, shapes[f"{layer}.residual.6.weight"][0]
    return [*stages, (blocks, width)], tuple(temporal)


def _layers(shapes: Mapping[str, Shape], prefix: str) -> list[str]:
    out: list[str] = []
    while any(f"{prefix}.{len(out)}.{sign}" in shapes for sign in ("residual.0.gamma", "resample.1.weight")):
        out.append(f"{prefix}.{len(out)}")
    return out


def _text(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> TextConfig:
    vocab, dim = shapes["token_embedding.weight"]
    layers = _count(shapes, "blocks.{}.attn.q.weight")
    tables = _count(shapes, "blocks.{}.pos_embedding.embedding.weight")
    if tables != layers:
        raise InputError(
            "E4020", f"this is a T5 encoder ({tables} of {layers} layers have positions), expected UMT5 (all of them)."
        )
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return TextConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.fc1.weight"][0],
        heads=heads,
        head_dim=shapes["blocks.0.attn.q.weight"][0] // heads,
        layers=layers,
        vocab=vocab,
        buckets=buckets,
        max_distance=given.get("max_distance", TextConfig.max_distance),
        eps=given.get("eps", TextConfig.eps),
    )


def _clip(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> ClipConfig:
    dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
    head_width = ClipConfig.dim // ClipConfig.heads  # 80; other towers have 64
    heads = given.get("heads") or dim // (head_width if dim % head_width == 0 else 64)
    if heads < 1 or dim % heads:
        raise InputError("E4023", f"the heads of width {dim} cannot be told. Put num_attention_heads in a config.json.")
    side = isqrt(shapes["visual.pos_embedding"][1] - 1)
    return ClipConfig(
        dim=dim,
        ffn_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        heads=heads,
        layers=_count(shapes, "visual.transformer.{}.norm1.weight"),
        patch=patch,
        image=patch * side,
        projection=shapes["visual.head"][1]
        if "visual.head" in shapes
        else given.get("projection", ClipConfig.projection),
        eps=given.get("eps", ClipConfig.eps),
    )


def _audio(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> AudioConfig:
    count = _count(shapes, "feature_extractor.conv_layers.{}.conv.weight")
    convs = [shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(count)]
    dim, per_group, positions = shapes["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    head_width = AudioConfig.dim // AudioConfig.heads
    heads = given.get("heads") or (dim // head_width if dim % head_width == 0 else 0)
    strides = tuple(given.get("conv_stride", AudioConfig.conv_stride))
    if heads < 1 or dim % heads:
        raise InputError("E4023", f"the heads of width {dim} cannot be told. Put num_attention_heads in a config.json.")
    if len(strides) != count:
        raise InputError("E4021", f"conv_stride has {len(strides)} numbers, there are {count} convolutions.")
    return AudioConfig(
        dim=dim,
        ffn_dim=shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
        heads=heads,
        layers=_count(shapes, "encoder.layers.{}.attention.q_proj.weight"),
        conv_dim=tuple(shape[0] for shape in convs),
        conv_kernel=tuple(shape[2] for shape in convs),
        conv_stride=strides,
        positions=positions,
        groups=dim // per_group,
        eps=given.get("eps", AudioConfig.eps),
    )


READERS: dict[
    str, tuple[Callable[[Mapping[str, Shape], Mapping[str, Any]], Any], Callable[[Any], dict[str, Shape]]]
] = {
    "dit": (_dit, dit_shapes),
    "vae": (_vae, vae_shapes),
    "text": (_text, text_shapes),
    "clip": (_clip, clip_shapes),
    "audio": (_audio, audio_shapes),
}

# Parts that other members of the family add to the transformer: a piece of a tensor's name -> who that is.
FOREIGN_MODELS = {
    "vace_": "a VACE model",
    "audio_proj.": "a MultiTalk model (audio)",
    "control_adapter.": "a camera control model",
}


# ---------------------------------------------------------------- which released model


# Fields of DiTConfig that are None where a transformer has no such part -> what the part is called.
PARTS = {
    "image_dim": "CLIP image branch",
    "image_positions": "last-image positions",
    "speech": "parts for speech",
    "animate": "parts for pose and face",
}


def form(config: DiTConfig) -> tuple[object, ...]:
    """What a task needs of a transformer whatever its size: channels in and out, and which parts it has."""
    return config.in_channels, config.out_channels, *(getattr(config, part) is not None for part in PARTS)


def same_size(a: DiTConfig, b: DiTConfig) -> bool:
    """Whether two transformers have the same tensors."""
    return dit_key(a) == dit_key(b)


def dit_key(config: DiTConfig) -> DiTConfig:
    """A config less what tensors do not show; of the blocks that hear or look at a face they show how many."""
    speech, animate = config.speech, config.animate
    if speech is not None:
        speech = replace(speech, layers=tuple(range(len(speech.layers))), history=1)
    if animate is not None:
        animate = replace(animate, layers=tuple(range(len(animate.layers))))
    return replace(config, heads=1, text_len=1, eps=1.0, speech=speech, animate=animate)


def candidates(config: DiTConfig, *, experts: int | None = None) -> list[str]:
    """The released models a transformer can belong to: all of its exact sizes, else all of its form.

    experts: how many transformers the checkpoint has, where that is known; rows with another number are left out.
    """
    rows = [row for row in VARIANTS.values() if form(row.dit) == form(config) and not row.demo]
    rows = [row for row in rows if experts in (None, len(row.experts))]
    exact = [row.name for row in rows if same_size(row.dit, config)]
    return exact or [row.name for row in rows]


def check_dit(path: Path, config: DiTConfig, variant: Variant) -> None:
    """E4016 when a transformer is not this variant: its form differs, or its sizes are those of another release."""
    expected = variant.dit
    known = [VARIANTS[name] for name in candidates(config)]
    if form(config) == form(expected):
        others = [row for row in known if same_size(row.dit, config)]
        if not others or any(same_size(row.dit, expected) for row in others) or variant.demo:
            return
        mine, theirs = _sizes(config), _sizes(expected)
    else:
        mine, theirs = _facts(config, expected)
    exact = [row for row in known if same_size(row.dit, config)]
    names = " or ".join(row.name for row in exact) if exact else known[0].name if known else "an unknown model"
    raise InputError("E4016", f"{path}: this is {names} ({mine}), expected {variant.name} ({theirs}).")


def _sizes(config: DiTConfig) -> str:
    return f"{config.layers} layers of {config.dim}"


def _facts(config: DiTConfig, expected: DiTConfig) -> tuple[str, str]:
    """How two forms differ, in words: what this one has, what was expected."""
    mine, theirs = [], []
    for label, get in (("input", "in_channels"), ("output", "out_channels")):
        a, b = getattr(config, get), getattr(expected, get)
        if a != b:
            mine.append(f"{a} {label} channels")
            theirs.append(str(b))
    for get, label in PARTS.items():
        a, b = getattr(config, get) is not None, getattr(expected, get) is not None
        if a != b:
            mine.append(label if a else f"no {label}")
            theirs.append(label if b else f"no {label}")
    return ", ".join(mine), ", ".join(theirs)


def check_vae(path: Path, config: VaeConfig, variant: Variant) -> None:
    """E4017 when the VAE is of the other generation."""
    mine, theirs = (config.z, config.residual), (variant.vae.z, variant.vae.residual)
    if mine != theirs or config.stride != variant.vae.stride:
        raise InputError(
            "E4017", f"{path}: this is {_vae_name(config)}, {variant.name} needs {_vae_name(variant.vae)}."
        )


def _vae_name(config: VaeConfig) -> str:
    generation = "Wan2.2" if config.residual else "Wan2.1"
    return f"the {generation} VAE ({config.z} latent channels, stride {'x'.join(map(str, config.stride))})"


def check_text(path: Path, config: TextConfig, dit: DiTConfig) -> None:
    """E4020 when the transformer cannot read what the encoder writes."""
    if config.dim != dit.text_dim:
        raise InputError(
            "E4020", f"{path}: a text encoder of width {config.dim}, the transformer reads {dit.text_dim}."
        )


def check_clip(path: Path, config: ClipConfig, dit: DiTConfig) -> None:
    """E4016 when the image branch cannot read what CLIP writes."""
    if dit.image_dim is not None and config.dim != dit.image_dim:
        raise InputError("E4016", f"{path}: a CLIP of width {config.dim}, the transformer reads {dit.image_dim}.")


def check_audio(path: Path, config: AudioConfig, dit: DiTConfig) -> None:
    """E4016 when the transformer cannot hear what the audio encoder writes: other width, or other number of states."""
    speech = dit.speech
    mine = (config.dim, config.layers + 1)
    if speech is not None and mine != (speech.audio_dim, speech.audio_states):
        raise InputError(
            "E4016",
            f"{path}: an audio encoder with {mine[1]} states of width {mine[0]}, "
            f"the transformer hears {speech.audio_states} of width {speech.audio_dim}.",
        )


def warn(code: str, text: str) -> None:
    """Say something once that is no error."""
    warnings.warn(WanloomWarning(f"warning[{code}]: {text}"), stacklevel=3)


def expert_hint(path: Path, names: Iterable[str]) -> str | None:
    """Which expert the name of a file, or else of its directory, speaks of; None when it says neither high nor low."""
    words = {"high": next((n for n in names if "high" in n), None), "low": next((n for n in names if "low" in n), None)}
    for part in reversed(path.parts[-2:]):
        said = {word for word in words if re.search(rf"(?<![a-z]){word}(?![a-z])", part.lower())}
        if len(said) == 1:
            return words[said.pop()]
        if part == "transformer_2":
            return words["low"]
        if part == "transformer":
            return words["high"]
    return None
