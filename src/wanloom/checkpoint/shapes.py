"""Every tensor of a model under its official name with its shape, from the config alone.

`budget.py` counts bytes; this says which names a whole checkpoint has, so that a missing, foreign or wrong-sized tensor
is found from headers in milliseconds, without torch.  Tests hold these tables against the modules on the meta device
and against the published manifests.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from wanloom.models.config import AnimateConfig, AudioConfig, ClipConfig, DiTConfig, SpeechConfig, TextConfig, VaeConfig

Shape = tuple[int, ...]


def dit_shapes(config: DiTConfig) -> dict[str, Shape]:
    """The transformer: `patch_embedding`, `blocks.N...`, `head`, and `img_emb` where it reads pictures."""
    dim, patch = config.dim, config.patch
    cells = patch[0] * patch[1] * patch[2]
    out: dict[str, Shape] = {
        "patch_embedding.weight": (dim, config.in_channels, *patch),
        "patch_embedding.bias": (dim,),
    }
    out |= _linear("text_embedding.0", config.text_dim, dim) | _linear("text_embedding.2", dim, dim)
    out |= _linear("time_embedding.0", config.freq_dim, dim) | _linear("time_embedding.2", dim, dim)
    out |= _linear("time_projection.1", dim, 6 * dim)
    for i in range(config.layers):
        out |= _block(f"blocks.{i}", config)
    out |= {"head.modulation": (1, 2, dim)} | _linear("head.head", dim, config.out_channels * cells)
    if config.image_dim is not None:
        image = config.image_dim
        out |= _norm("img_emb.proj.0", image) | _linear("img_emb.proj.1", image, image)
        out |= _linear("img_emb.proj.3", image, dim) | _norm("img_emb.proj.4", dim)
        if config.image_positions is not None:
            out["img_emb.emb_pos"] = (1, config.image_positions, image)
    return out | adapter_shapes(config)


def adapter_shapes(config: DiTConfig) -> dict[str, Shape]:
    """The parts that s2v or animate add to a transformer; nothing for the others."""
    out: dict[str, Shape] = {}
    if config.speech is not None:
        out |= _speech(config, config.speech)
    if config.animate is not None:
        out |= _animate(config, config.animate)
    return out


def _block(name: str, config: DiTConfig) -> dict[str, Shape]:
    dim = config.dim
    out: dict[str, Shape] = {f"{name}.modulation": (1, 6, dim)} | _norm(f"{name}.norm3", dim)
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            out |= _linear(f"{name}.{attention}.{part}", dim, dim)
        for part in "qk":
            out[f"{name}.{attention}.norm_{part}.weight"] = (dim,)
    if config.image_dim is not None:
        out |= _linear(f"{name}.cross_attn.k_img", dim, dim) | _linear(f"{name}.cross_attn.v_img", dim, dim)
        out[f"{name}.cross_attn.norm_k_img.weight"] = (dim,)
    return out | _linear(f"{name}.ffn.0", dim, config.ffn_dim) | _linear(f"{name}.ffn.2", config.ffn_dim, dim)


def _speech(config: DiTConfig, speech: SpeechConfig) -> dict[str, Shape]:
    """What s2v adds: `cond_encoder`, `casual_audio_encoder`, `audio_injector`, `frame_packer`, kinds of tokens."""
    dim, patch = config.dim, config.patch
    encoder = "casual_audio_encoder.encoder"
    out: dict[str, Shape] = {
        "cond_encoder.weight": (dim, speech.channels, *patch),
        "cond_encoder.bias": (dim,),
        "casual_audio_encoder.weights": (1, speech.audio_states, 1, 1),
        f"{encoder}.padding_tokens": (1, 1, 1, dim),
        "trainable_cond_mask.weight": (3, dim),
    }
    for name, inputs, outputs in (
        ("conv1_local", speech.audio_dim, speech.tokens * (dim // 4)),
        ("conv1_global", speech.audio_dim, dim // 4),
        ("conv2", dim // 4, dim // 2),
        ("conv3", dim // 2, dim),
    ):
        out |= {f"{encoder}.{name}.conv.weight": (outputs, inputs, 3), f"{encoder}.{name}.conv.bias": (outputs,)}
    out |= _linear(f"{encoder}.final_linear", dim, dim)
    for i in range(len(speech.layers)):
        name = f"audio_injector.injector.{i}"
        for part in "qkvo":
            out |= _linear(f"{name}.{part}", dim, dim)
        out |= {f"{name}.norm_q.weight": (dim,), f"{name}.norm_k.weight": (dim,)}
        out |= _linear(f"audio_injector.injector_adain_layers.{i}.linear", dim, 2 * dim)
    for name, kernel in (("proj", (1, 2, 2)), ("proj_2x", (2, 4, 4)), ("proj_4x", (4, 8, 8))):
        out[f"frame_packer.{name}.weight"] = (dim, speech.channels, *kernel)
        out[f"frame_packer.{name}.bias"] = (dim,)
    return out


def _animate(config: DiTConfig, animate: AnimateConfig) -> dict[str, Shape]:
    """What animate adds: `pose_patch_embedding`, `motion_encoder`, `face_encoder`, `face_adapter`."""
    dim, face, width = config.dim, animate.face_dim, config.head_dim
    motion, widths = animate.motion_dim, animate.widths
    out: dict[str, Shape] = {
        "pose_patch_embedding.weight": (dim, animate.channels, *config.patch),
        "pose_patch_embedding.bias": (dim,),
        "motion_encoder.dec.direction.weight": (motion, animate.directions),
        "face_encoder.padding_tokens": (1, 1, 1, dim),
    }
    convs = "motion_encoder.enc.net_app.convs"
    out |= {f"{convs}.0.0.weight": (widths[0], 3, 1, 1), f"{convs}.0.1.bias": (1, widths[0], 1, 1)}
    for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        out |= {
            f"{convs}.{i}.conv1.0.weight": (inputs, inputs, 3, 3),
            f"{convs}.{i}.conv1.1.bias": (1, inputs, 1, 1),
            f"{convs}.{i}.conv2.0.kernel": (4, 4),
            f"{convs}.{i}.conv2.1.weight": (outputs, inputs, 3, 3),
            f"{convs}.{i}.conv2.2.bias": (1, outputs, 1, 1),
            f"{convs}.{i}.skip.0.kernel": (4, 4),
            f"{convs}.{i}.skip.1.weight": (outputs, inputs, 1, 1),
        }
    out[f"{convs}.{len(widths)}.weight"] = (motion, widths[-1], 4, 4)
    for i in range(5):
        out |= _linear(f"motion_encoder.enc.fc.{i}", motion, animate.directions if i == 4 else motion)
    for name, inputs, outputs in (
        ("conv1_local", motion, animate.tokens * face),
        ("conv2", face, face),
        ("conv3", face, face),
    ):
        out |= {f"face_encoder.{name}.conv.weight": (outputs, inputs, 3), f"face_encoder.{name}.conv.bias": (outputs,)}
    out |= _linear("face_encoder.out_proj", face, dim)
    for i in range(len(animate.layers)):
        name = f"face_adapter.fuser_blocks.{i}"
        out |= _linear(f"{name}.linear1_kv", dim, 2 * dim) | _linear(f"{name}.linear1_q", dim, dim)
        out |= _linear(f"{name}.linear2", dim, dim)
        out |= {f"{name}.q_norm.weight": (width,), f"{name}.k_norm.weight": (width,)}
    return out


def vae_shapes(config: VaeConfig) -> dict[str, Shape]:
    """The causal VAE of either generation (`residual` is Wan2.2's: stages have a list of their own)."""
    pixels, z = 3 * config.patch**2, config.z
    top = config.dim * config.multipliers[-1]
    out = _conv3("encoder.conv1", pixels, config.dim)
    for name, layer in _stages(config, encoder=True):
        out |= {f"encoder.downsamples.{name}.{key}": shape for key, shape in layer.items()}
    out |= _middle("encoder", top) | _vae_head("encoder", top, 2 * z)
    out |= _conv3("conv1", 2 * z, 2 * z, 1) | _conv3("conv2", z, z, 1)
    first = config.decoder_dim * config.multipliers[-1]
    out |= _conv3("decoder.conv1", z, first) | _middle("decoder", first)
    for name, layer in _stages(config, encoder=False):
        out |= {f"decoder.upsamples.{name}.{key}": shape for key, shape in layer.items()}
    return out | _vae_head("decoder", config.decoder_dim * config.multipliers[0], pixels)


def _stages(config: VaeConfig, *, encoder: bool) -> Iterator[tuple[str, dict[str, Shape]]]:
    """The layers of all stages: ("3", tensors) or, in Wan2.2, ("0.downsamples.2", tensors)."""
    if encoder:
        widths = [config.dim * m for m in (1, *config.multipliers)]
        temporal, count, inner = config.temporal, config.blocks, "downsamples"
    else:
        widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        temporal, count, inner = tuple(reversed(config.temporal)), config.blocks + 1, "upsamples"
    flat = 0
    for stage in range(len(config.multipliers)):
        inputs, outputs = widths[stage], widths[stage + 1]
        if stage and not encoder and not config.residual:
            inputs //= 2  # Wan2.1's upsampling convolution halves the channels
        layers = [_residual(inputs if i == 0 else outputs, outputs) for i in range(count)]
        if stage < len(temporal):
            thin = outputs // 2 if not encoder and not config.residual else outputs
            time = outputs if encoder else 2 * outputs
            layers.append(_resample(outputs, thin, time if temporal[stage] else None))
        for i, layer in enumerate(layers):
            yield (f"{stage}.{inner}.{i}" if config.residual else f"{flat + i}"), layer
        flat += len(layers)


def _residual(inputs: int, outputs: int) -> dict[str, Shape]:
    out: dict[str, Shape] = {"residual.0.gamma": (inputs, 1, 1, 1)} | _conv3("residual.2", inputs, outputs)
    out |= {"residual.3.gamma": (outputs, 1, 1, 1)} | _conv3("residual.6", outputs, outputs)
    return out | (_conv3("shortcut", inputs, outputs, 1) if inputs != outputs else {})


def _resample(inputs: int, outputs: int, time: int | None) -> dict[str, Shape]:
    out: dict[str, Shape] = {"resample.1.weight": (outputs, inputs, 3, 3), "resample.1.bias": (outputs,)}
    if time is not None:
        out |= {"time_conv.weight": (time, inputs, 3, 1, 1), "time_conv.bias": (time,)}
    return out


def _middle(side: str, dim: int) -> dict[str, Shape]:
    out = {f"{side}.middle.{i}.{key}": shape for i in (0, 2) for key, shape in _residual(dim, dim).items()}
    name = f"{side}.middle.1"
    out |= {f"{name}.norm.gamma": (dim, 1, 1)}
    out |= {f"{name}.to_qkv.weight": (3 * dim, dim, 1, 1), f"{name}.to_qkv.bias": (3 * dim,)}
    return out | {f"{name}.proj.weight": (dim, dim, 1, 1), f"{name}.proj.bias": (dim,)}


def _vae_head(side: str, dim: int, outputs: int) -> dict[str, Shape]:
    return {f"{side}.head.0.gamma": (dim, 1, 1, 1)} | _conv3(f"{side}.head.2", dim, outputs)


def text_shapes(config: TextConfig) -> dict[str, Shape]:
    """The UMT5 encoder: every block has its own table of relative positions."""
    dim, inner, wide = config.dim, config.heads * config.head_dim, config.ffn_dim
    out: dict[str, Shape] = {"token_embedding.weight": (config.vocab, dim)}
    for i in range(config.layers):
        name = f"blocks.{i}"
        out |= {f"{name}.norm1.weight": (dim,), f"{name}.norm2.weight": (dim,)}
        out |= {f"{name}.attn.{part}.weight": (inner, dim) for part in "qkv"}
        out |= {f"{name}.attn.o.weight": (dim, inner)}
        out |= {f"{name}.pos_embedding.embedding.weight": (config.buckets, config.heads)}
        out |= {f"{name}.ffn.gate.0.weight": (wide, dim), f"{name}.ffn.fc1.weight": (wide, dim)}
        out |= {f"{name}.ffn.fc2.weight": (dim, wide)}
    return out | {"norm.weight": (dim,)}


def clip_shapes(config: ClipConfig) -> dict[str, Shape]:
    """CLIP's visual tower.  `visual.head`, the projection into CLIP's common space, is stored but never computed."""
    dim, side = config.dim, config.image // config.patch
    out: dict[str, Shape] = {
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, side * side + 1, dim),
        "visual.head": (dim, config.projection),
        "visual.patch_embedding.weight": (dim, 3, config.patch, config.patch),
    }
    out |= _norm("visual.pre_norm", dim) | _norm("visual.post_norm", dim)
    for i in range(config.layers):
        name = f"visual.transformer.{i}"
        out |= _norm(f"{name}.norm1", dim) | _norm(f"{name}.norm2", dim)
        out |= _linear(f"{name}.attn.to_qkv", dim, 3 * dim) | _linear(f"{name}.attn.proj", dim, dim)
        out |= _linear(f"{name}.mlp.0", dim, config.ffn_dim) | _linear(f"{name}.mlp.2", config.ffn_dim, dim)
    return out


def audio_shapes(config: AudioConfig) -> dict[str, Shape]:
    """The wav2vec2 encoder of s2v, as transformers calls its tensors."""
    dim, wide, conv = config.dim, config.ffn_dim, "feature_extractor.conv_layers"
    out: dict[str, Shape] = {}
    for i, (inputs, outputs, kernel) in enumerate(
        zip((1, *config.conv_dim), config.conv_dim, config.conv_kernel, strict=False)
    ):
        out |= {f"{conv}.{i}.conv.weight": (outputs, inputs, kernel), f"{conv}.{i}.conv.bias": (outputs,)}
        out |= _norm(f"{conv}.{i}.layer_norm", outputs)
    out |= _norm("feature_projection.layer_norm", config.conv_dim[-1])
    out |= _linear("feature_projection.projection", config.conv_dim[-1], dim)
    place = "encoder.pos_conv_embed.conv"
    out |= {
        f"{place}.bias": (dim,),
        f"{place}.parametrizations.weight.original0": (1, 1, config.positions),
        f"{place}.parametrizations.weight.original1": (dim, dim // config.groups, config.positions),
    }
    out |= _norm("encoder.layer_norm", dim)
    for i in range(config.layers):
        name = f"encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            out |= _linear(f"{name}.attention.{part}_proj", dim, dim)
        out |= _norm(f"{name}.layer_norm", dim) | _norm(f"{name}.final_layer_norm", dim)
        out |= _linear(f"{name}.feed_forward.intermediate_dense", dim, wide)
        out |= _linear(f"{name}.feed_forward.output_dense", wide, dim)
    return out


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _conv3(name: str, inputs: int, outputs: int, kernel: int = 3) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel, kernel), f"{name}.bias": (outputs,)}
