"""What the files of a model are called in each project, and what stands in their JSON files.

    official    the published directories: high_noise_model/, Wan2.1_VAE, models_t5..., google/umt5-xxl/
    diffusers   transformer/, transformer_2/, vae/, text_encoder/, tokenizer/, model_index.json
    comfy       split_files/diffusion_models/*.safetensors and so on: one file a model, official names

VAE and encoders are written as safetensors where the published directory has pickles.  The transformers of s2v and
animate, and s2v's audio encoder, have no place in diffusers' layout here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wanloom.checkpoint.detect import face_layers
from wanloom.checkpoint.find import AUDIO, COMFY, DIFFUSERS, DIFFUSERS_EXPERTS, EXPERTS, OFFICIAL, TOKENIZERS
from wanloom.models.config import AudioConfig, ClipConfig, DiTConfig, TextConfig, VaeConfig
from wanloom.variants import VARIANTS, Variant

LAYOUTS = ("official", "diffusers", "comfy")

# Layout -> kind of model -> the names of its tensors there.
FORMAT_NAMES = {
    "official": {"dit": "official", "vae": "official", "text": "official", "clip": "official", "audio": "official"},
    "diffusers": {"dit": "diffusers", "vae": "diffusers", "text": "transformers", "clip": "transformers"},
    "comfy": {
        "dit": "official",
        "vae": "official",
        "text": "transformers",
        "clip": "transformers",
        "audio": "official",
    },
}
TOKENIZER_PLACE = {"official": TOKENIZERS[0], "diffusers": TOKENIZERS[1], "comfy": TOKENIZERS[2]}


def place(layout: str, part: str, config: object, *, expert: str = "model", name: str = "wan") -> tuple[str, str]:
    """(directory, stem) of a part's file in a layout; `name` is what a ComfyUI transformer is called."""
    if layout == "official":
        if part == "dit":
            return "" if expert == "model" else expert, "diffusion_pytorch_model"
        if part == "audio":
            return AUDIO, "model"
        stems = OFFICIAL[part]
        return "", stems[1] if isinstance(config, VaeConfig) and config.residual else stems[0]
    if layout == "diffusers":
        if part == "dit":
            return DIFFUSERS_EXPERTS[EXPERTS.index(expert) if expert in EXPERTS else 0], "diffusion_pytorch_model"
        return DIFFUSERS[part], "diffusion_pytorch_model" if part == "vae" else "model"
    stem = {
        "dit": name if expert == "model" else f"{name}_{expert.removesuffix('_model')}",
        "vae": "wan2.2_vae" if isinstance(config, VaeConfig) and config.residual else "wan_2.1_vae",
        "text": "umt5_xxl",
        "clip": "clip_vision_h",
        "audio": "wav2vec2_large_english",
    }[part]
    return f"split_files/{COMFY[part]}", stem


# ---------------------------------------------------------------- config.json


def official_config(config: DiTConfig) -> dict[str, Any]:
    """The config.json of a published transformer, and the keys it leaves to a default where ours differ."""
    image = config.image_dim is not None
    kind = "flf2v" if config.image_positions else "i2v" if image or config.in_channels > config.out_channels else "t2v"
    out: dict[str, Any] = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "ti2v" if config.out_channels == 48 else kind,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }
    published = DiTConfig()
    if config.text_dim != published.text_dim:
        out["text_dim"] = config.text_dim
    if config.patch != published.patch:
        out["patch_size"] = list(config.patch)
    if config.animate is not None:
        del out["model_type"]  # a class of its own, without the key
    return out | _speech_keys(config) | _animate_keys(config)


def _speech_keys(config: DiTConfig) -> dict[str, Any]:
    """What s2v's config.json says besides."""
    speech = config.speech
    if speech is None:
        return {}
    return {
        "_class_name": "WanModel_S2V",
        "adain_mode": "attn_norm",
        "add_last_motion": True,
        "audio_dim": speech.audio_dim,
        "audio_inject_layers": list(speech.layers),
        "cond_dim": speech.channels,
        "enable_adain": True,
        "enable_framepack": True,
        "enable_motioner": False,
        "enable_tsm": False,
        "framepack_drop_mode": "padd",
        "model_type": "s2v",
        "motion_token_num": 1024,
        "num_audio_token": speech.tokens,
        "trainable_token_pos_emb": False,
        "zero_init": False,
        "zero_timestep": True,
    }


def _animate_keys(config: DiTConfig) -> dict[str, Any]:
    """What animate's config.json says besides, and after which blocks it looks at the face where that is unusual."""
    animate = config.animate
    if animate is None:
        return {}
    out: dict[str, Any] = {
        "_class_name": "WanAnimateModel",
        "motion_encoder_dim": animate.motion_dim,
        "use_img_emb": True,
    }
    if animate.layers != face_layers(config.layers):
        out["face_adapter_layers"] = list(animate.layers)
    return out


def diffusers_dit(config: DiTConfig) -> dict[str, Any]:
    """diffusers' WanTransformer3DModel.  It has no key for the text length: `__metadata__` keeps that."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.35.0",
        "added_kv_proj_dim": config.dim if config.image_dim is not None else None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": config.image_positions,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def diffusers_vae(config: VaeConfig) -> dict[str, Any]:
    """diffusers' AutoencoderKLWan."""
    time, space, _ = config.stride
    channels = 3 * config.patch**2
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35.0",
        "attn_scales": [],
        "base_dim": config.dim,
        "decoder_base_dim": config.decoder_dim,
        "dim_mult": list(config.multipliers),
        "dropout": 0.0,
        "in_channels": channels,
        "is_residual": config.residual,
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
        "num_res_blocks": config.blocks,
        "out_channels": channels,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_spatial": space,
        "scale_factor_temporal": time,
        "temperal_downsample": list(config.temporal),
        "z_dim": config.z,
    }


def transformers_text(config: TextConfig) -> dict[str, Any]:
    """transformers' UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": config.ffn_dim,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "scalable_attention": True,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab,
    }


def transformers_clip(config: ClipConfig) -> dict[str, Any]:
    """transformers' CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": config.dim,
        "image_size": config.image,
        "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.eps,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
        "projection_dim": config.projection,
    }


def transformers_audio(config: AudioConfig) -> dict[str, Any]:
    """transformers' Wav2Vec2Model."""
    return {
        "architectures": ["Wav2Vec2Model"],
        "model_type": "wav2vec2",
        "add_adapter": False,
        "conv_bias": True,
        "conv_dim": list(config.conv_dim),
        "conv_kernel": list(config.conv_kernel),
        "conv_stride": list(config.conv_stride),
        "do_stable_layer_norm": True,
        "feat_extract_activation": "gelu",
        "feat_extract_norm": "layer",
        "hidden_act": "gelu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.eps,
        "mask_feature_prob": 0.0,
        "mask_time_prob": 0.0,
        "num_attention_heads": config.heads,
        "num_conv_pos_embedding_groups": config.groups,
        "num_conv_pos_embeddings": config.positions,
        "num_hidden_layers": config.layers,
    }


def config_json(layout: str, config: object) -> dict[str, Any] | None:
    """The config.json beside a model in a layout, or None where it has none."""
    if layout == "comfy" or (layout == "official" and not isinstance(config, DiTConfig | AudioConfig)):
        return None
    if isinstance(config, AudioConfig):
        return transformers_audio(config)
    if isinstance(config, DiTConfig):
        return official_config(config) if layout == "official" else diffusers_dit(config)
    if isinstance(config, VaeConfig):
        return diffusers_vae(config)
    if isinstance(config, TextConfig):
        return transformers_text(config)
    assert isinstance(config, ClipConfig)
    return transformers_clip(config)


def hidden_facts(config: object) -> dict[str, Any]:
    """What tensor shapes do not tell, in the keys of config.json: kept in `__metadata__`, so that a file can travel."""
    if isinstance(config, DiTConfig):
        out: dict[str, Any] = {"num_heads": config.heads, "text_len": config.text_len, "eps": config.eps}
        if config.speech is not None:
            out["audio_inject_layers"] = list(config.speech.layers)
        if config.animate is not None:
            out["face_adapter_layers"] = list(config.animate.layers)
        return out
    if isinstance(config, TextConfig):
        return {"relative_attention_max_distance": config.max_distance, "layer_norm_epsilon": config.eps}
    if isinstance(config, ClipConfig):
        return {
            "num_attention_heads": config.heads,
            "layer_norm_eps": config.eps,
            "projection_dim": config.projection,
        }
    if isinstance(config, AudioConfig):
        return {
            "num_attention_heads": config.heads,
            "layer_norm_eps": config.eps,
            "conv_stride": list(config.conv_stride),
        }
    assert isinstance(config, VaeConfig)
    return {"latents_mean": list(config.mean), "latents_std": list(config.std)}


def model_index(variants: Sequence[str], experts: int, *, clip: bool) -> dict[str, Any]:
    """diffusers' model_index.json of a whole directory; `variants`: the released models it can be, likeliest first."""
    row: Variant | None = next((VARIANTS[name] for name in variants), None)
    pictures = row is not None and row.conditioner == "image"
    transformer = ["diffusers", "WanTransformer3DModel"]
    out: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if pictures else "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": row.experts[0][1] if row is not None and len(row.experts) == experts == 2 else None,
        "expand_timesteps": row is not None and row.conditioner == "clean_frame",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if experts == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if pictures:
        out["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else [None, None]
        out["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    return out


def scheduler_config(variants: Sequence[str]) -> dict[str, Any]:
    """diffusers' scheduler with the shift of the released model."""
    row = next((VARIANTS[name] for name in variants), None)
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "flow_shift": row.defaults.shift if row is not None else 5.0,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


# CLIP's picture processing, for diffusers' image_processor/.
IMAGE_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
