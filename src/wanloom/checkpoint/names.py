"""What other projects call our tensors: rename rules as data, read in both directions.

The official names are the common tongue.  A `Format` says by which key it is told (`telling`), how each of its names
reads officially (`rules`) and which of its tensors carry no weights of ours (`ignored`).  A rule is a pair of
templates, anchored at both ends: `{i}` is a number, `{p}` is weight or bias, `{x:q|k|v}` one of these words.  Where one
tensor becomes several or changes its shape, the rule names an operation of `OPERATIONS`.

To read a new project's files, add a Format to `FORMATS`: nothing else changes.  Sources of the maps: diffusers'
`convert_wan_to_diffusers.py`, transformers' UMT5 and CLIP, ComfyUI's loaders; each was checked to be one to one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from wanloom.models.config import VAE_21

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

# ---------------------------------------------------------------- operations on values


@dataclass(frozen=True)
class Operation:
    """How an official tensor becomes the foreign ones (`out`) and back (`into`), for shapes and for values.

    A shape that cannot come from this operation gives None.
    """

    parts: int
    out_shapes: Callable[[Shape], list[Shape]]
    into_shape: Callable[[Sequence[Shape]], Shape | None]
    out: Callable[[Tensor], list[Tensor]]
    into: Callable[[Sequence[Tensor]], Tensor]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts))


def _thirds(shape: Shape) -> list[Shape]:
    return [(shape[0] // 3, *shape[1:])] * 3


def _joined(shapes: Sequence[Shape]) -> Shape | None:
    same = len({tuple(shape) for shape in shapes}) == 1 and bool(shapes[0])
    return (3 * shapes[0][0], *shapes[0][1:]) if same else None


OPERATIONS = {
    "same": Operation(1, lambda s: [s], lambda s: s[0], lambda t: [t], lambda t: t[0]),
    # one matrix for q, k and v, stacked in this order
    "split_qkv": Operation(3, _thirds, _joined, lambda t: list(t.chunk(3)), _cat),
    # official parameters have leading axes of one
    "drop_two": Operation(
        1, lambda s: [s[2:]], lambda s: (1, 1, *s[0]), lambda t: [t[0, 0]], lambda t: t[0][None, None]
    ),
    "drop_one": Operation(1, lambda s: [s[1:]], lambda s: (1, *s[0]), lambda t: [t[0]], lambda t: t[0][None]),
    "transpose": Operation(
        1, lambda s: [s[::-1]], lambda s: s[0][::-1], lambda t: [t.T.contiguous()], lambda t: t[0].T.contiguous()
    ),
}  # fmt: skip


# ---------------------------------------------------------------- rules and formats


@dataclass(frozen=True)
class Rule:
    """`official` and the `foreign` templates it becomes (one, or as many as the operation has parts)."""

    official: str
    foreign: tuple[str, ...]
    operation: str = "same"

    def foreign_names(self, name: str) -> tuple[str, ...] | None:
        """What an official name is called, or None when the rule is about others."""
        match = self._patterns[0].fullmatch(name)
        return tuple(_fill(template, match) for template in self.foreign) if match else None

    def official_name(self, name: str) -> tuple[str, int] | None:
        """The official name of a foreign one and which part of it this is, or None."""
        for part, pattern in enumerate(self._patterns[1:]):
            match = pattern.fullmatch(name)
            if match:
                return _fill(self.official, match), part
        return None

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(template) for template in (self.official, *self.foreign)]


_HOLE = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of a template."""
    out, end = "", 0
    for hole in _HOLE.finditer(template):
        words = hole[2] or ("weight|bias" if hole[1] == "p" else r"0|[1-9]\d*")
        out += re.escape(template[end : hole.start()]) + f"(?P<{hole[1]}>{words})"
        end = hole.end()
    return re.compile(out + re.escape(template[end:]), re.ASCII)


def _fill(template: str, match: re.Match[str]) -> str:
    return _HOLE.sub(lambda hole: match[hole[1]], template)


@dataclass(frozen=True)
class Format:
    """One project's names of one kind of model."""

    kind: str  # dit, vae, text, clip, audio
    name: str  # official, diffusers, transformers
    telling: tuple[str, ...]  # names that together only this format has, behind one of the prefixes
    rules: tuple[Rule, ...] = ()  # none: the names are the official ones
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that are not ours
    aliases: tuple[tuple[str, str], ...] = ()  # a second name, read when the first is absent

    def prefix_of(self, names: Iterable[str]) -> str | None:
        """The prefix under which the telling names stand, or None when this is another format."""
        for prefix in self.prefixes:
            if all(prefix + name in names for name in self.telling):
                return prefix
        return None

    def official(self, name: str) -> tuple[str, int, str] | None:
        """(official name, part, operation) of a name of this format; None for a name it does not have."""
        if not self.rules:
            return name, 0, "same"
        for rule in self._candidates(name):
            found = rule.official_name(name)
            if found:
                return *found, rule.operation
        return None

    def foreign(self, name: str) -> tuple[tuple[str, ...], str] | None:
        """(names in this format, operation) of an official name; None when the format has no such tensor."""
        if not self.rules:
            return (name,), "same"
        for rule in self.rules:
            found = rule.foreign_names(name)
            if found:
                return found, rule.operation
        return None

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def _candidates(self, name: str) -> Sequence[Rule]:
        """The rules that share the first word of the name: there are up to a hundred rules and thousands of names."""
        return self._by_word.get(name.partition(".")[0], ())

    @cached_property
    def _by_word(self) -> Mapping[str, list[Rule]]:
        table: dict[str, list[Rule]] = {}
        for rule in self.rules:
            for word in {template.partition(".")[0] for template in rule.foreign}:
                table.setdefault(word, []).append(rule)
        return table


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, (name,)) for name in names)


def _pairs(table: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(official, (foreign,)) for official, foreign in table.items())


# ---------------------------------------------------------------- the transformer

# diffusers counts the norms in the order they are called: the official norm3 is its norm2.
DIT_DIFFUSERS = _same("patch_embedding.{p}") + _pairs(
    {
        "time_embedding.0.{p}": "condition_embedder.time_embedder.linear_1.{p}",
        "time_embedding.2.{p}": "condition_embedder.time_embedder.linear_2.{p}",
        "text_embedding.0.{p}": "condition_embedder.text_embedder.linear_1.{p}",
        "text_embedding.2.{p}": "condition_embedder.text_embedder.linear_2.{p}",
        "time_projection.1.{p}": "condition_embedder.time_proj.{p}",
        "head.modulation": "scale_shift_table",
        "head.head.{p}": "proj_out.{p}",
        "img_emb.proj.0.{p}": "condition_embedder.image_embedder.norm1.{p}",
        "img_emb.proj.1.{p}": "condition_embedder.image_embedder.ff.net.0.proj.{p}",
        "img_emb.proj.3.{p}": "condition_embedder.image_embedder.ff.net.2.{p}",
        "img_emb.proj.4.{p}": "condition_embedder.image_embedder.norm2.{p}",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "blocks.{i}.modulation": "blocks.{i}.scale_shift_table",
        "blocks.{i}.norm3.{p}": "blocks.{i}.norm2.{p}",
        "blocks.{i}.self_attn.{x:q|k|v}.{p}": "blocks.{i}.attn1.to_{x:q|k|v}.{p}",
        "blocks.{i}.self_attn.o.{p}": "blocks.{i}.attn1.to_out.0.{p}",
        "blocks.{i}.self_attn.norm_{x:q|k}.weight": "blocks.{i}.attn1.norm_{x:q|k}.weight",
        "blocks.{i}.cross_attn.{x:q|k|v}.{p}": "blocks.{i}.attn2.to_{x:q|k|v}.{p}",
        "blocks.{i}.cross_attn.o.{p}": "blocks.{i}.attn2.to_out.0.{p}",
        "blocks.{i}.cross_attn.norm_{x:q|k}.weight": "blocks.{i}.attn2.norm_{x:q|k}.weight",
        "blocks.{i}.cross_attn.{x:k|v}_img.{p}": "blocks.{i}.attn2.add_{x:k|v}_proj.{p}",
        "blocks.{i}.cross_attn.norm_k_img.weight": "blocks.{i}.attn2.norm_added_k.weight",
        "blocks.{i}.ffn.0.{p}": "blocks.{i}.ffn.net.0.proj.{p}",
        "blocks.{i}.ffn.2.{p}": "blocks.{i}.ffn.net.2.{p}",
    }
)

# ---------------------------------------------------------------- the VAEs

_RESIDUAL = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2.{p}": "conv1.{p}",
    "residual.3.gamma": "norm2.gamma",
    "residual.6.{p}": "conv2.{p}",
    "shortcut.{p}": "conv_shortcut.{p}",
}
_RESAMPLE = {"resample.1.{p}": "resample.1.{p}", "time_conv.{p}": "time_conv.{p}"}
_ATTENTION = {"norm.gamma": "norm.gamma", "to_qkv.{p}": "to_qkv.{p}", "proj.{p}": "proj.{p}"}
_STAGES = 8  # more stages than any VAE has


def _under(official: str, foreign: str, table: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{official}.{a}", (f"{foreign}.{b}",)) for a, b in table.items())


def vae_diffusers(blocks: int = VAE_21.blocks, *, residual: bool = False) -> tuple[Rule, ...]:
    """The rules of a VAE with this many residual blocks a stage; `residual` is Wan2.2's layout of stages.

    Wan2.1 counts encoder layers through all stages in both projects, decoder layers only in the official one.
    """
    rules = _pairs({"conv1.{p}": "quant_conv.{p}", "conv2.{p}": "post_quant_conv.{p}"})
    for side in ("encoder", "decoder"):
        rules += _pairs(
            {
                f"{side}.conv1.{{p}}": f"{side}.conv_in.{{p}}",
                f"{side}.head.0.gamma": f"{side}.norm_out.gamma",
                f"{side}.head.2.{{p}}": f"{side}.conv_out.{{p}}",
            }
        )
        rules += _under(f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RESIDUAL)
        rules += _under(f"{side}.middle.1", f"{side}.mid_block.attentions.0", _ATTENTION)
        rules += _under(f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RESIDUAL)
    if residual:
        down, up = "encoder.downsamples.{s}.downsamples", "decoder.upsamples.{s}.upsamples"
        rules += _under(f"{down}.{{k}}", "encoder.down_blocks.{s}.resnets.{k}", _RESIDUAL)
        rules += _under(f"{down}.{blocks}", "encoder.down_blocks.{s}.downsampler", _RESAMPLE)
        rules += _under(f"{up}.{{k}}", "decoder.up_blocks.{s}.resnets.{k}", _RESIDUAL)
        rules += _under(f"{up}.{blocks + 1}", "decoder.up_blocks.{s}.upsampler", _RESAMPLE)
        return rules
    rules += _under("encoder.downsamples.{k}", "encoder.down_blocks.{k}", _RESIDUAL | _RESAMPLE)
    for stage in range(_STAGES):
        first = stage * (blocks + 2)
        for k in range(blocks + 1):
            rules += _under(f"decoder.upsamples.{first + k}", f"decoder.up_blocks.{stage}.resnets.{k}", _RESIDUAL)
        foreign = f"decoder.up_blocks.{stage}.upsamplers.0"
        rules += _under(f"decoder.upsamples.{first + blocks + 1}", foreign, _RESAMPLE)
    return rules


# ---------------------------------------------------------------- the encoders

_T5 = "encoder.block.{i}.layer"
TEXT_TRANSFORMERS = _pairs(
    {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
        "blocks.{i}.norm1.weight": f"{_T5}.0.layer_norm.weight",
        "blocks.{i}.attn.{x:q|k|v|o}.weight": f"{_T5}.0.SelfAttention.{{x:q|k|v|o}}.weight",
        "blocks.{i}.pos_embedding.embedding.weight": f"{_T5}.0.SelfAttention.relative_attention_bias.weight",
        "blocks.{i}.norm2.weight": f"{_T5}.1.layer_norm.weight",
        "blocks.{i}.ffn.gate.0.weight": f"{_T5}.1.DenseReluDense.wi_0.weight",
        "blocks.{i}.ffn.fc1.weight": f"{_T5}.1.DenseReluDense.wi_1.weight",
        "blocks.{i}.ffn.fc2.weight": f"{_T5}.1.DenseReluDense.wo.weight",
    }
)

_VIT = "encoder.layers.{i}"
CLIP_TRANSFORMERS = (
    Rule("visual.cls_embedding", ("embeddings.class_embedding",), "drop_two"),
    Rule("visual.pos_embedding", ("embeddings.position_embedding.weight",), "drop_one"),
    Rule("visual.head", ("visual_projection.weight",), "transpose"),
    Rule(
        "visual.transformer.{i}.attn.to_qkv.{p}",
        tuple(f"{_VIT}.self_attn.{part}_proj.{{p}}" for part in "qkv"),
        "split_qkv",
    ),
    *_pairs(
        {
            "visual.patch_embedding.weight": "embeddings.patch_embedding.weight",
            "visual.pre_norm.{p}": "pre_layrnorm.{p}",  # transformers' own spelling
            "visual.post_norm.{p}": "post_layernorm.{p}",
            "visual.transformer.{i}.norm{x:1|2}.{p}": f"{_VIT}.layer_norm{{x:1|2}}.{{p}}",
            "visual.transformer.{i}.attn.proj.{p}": f"{_VIT}.self_attn.out_proj.{{p}}",
            "visual.transformer.{i}.mlp.0.{p}": f"{_VIT}.mlp.fc1.{{p}}",
            "visual.transformer.{i}.mlp.2.{p}": f"{_VIT}.mlp.fc2.{{p}}",
        }
    ),
)

# ---------------------------------------------------------------- the table

# ComfyUI marks files whose weights have scales, and says the number format of a layer beside it.
_MARKS = ("scaled_fp8", r".*\.comfy_quant")

FORMATS = (
    Format(
        "dit", "official", ("patch_embedding.weight", "blocks.0.self_attn.q.weight"),
        prefixes=("", "model.diffusion_model.", "diffusion_model."), ignored=_MARKS,
    ),
    Format(
        "dit", "diffusers", ("patch_embedding.weight", "blocks.0.attn1.to_q.weight"), DIT_DIFFUSERS, ignored=_MARKS,
    ),
    Format("vae", "official", ("encoder.conv1.weight", "decoder.conv1.weight"), ignored=_MARKS),
    Format(
        "vae", "diffusers", ("encoder.conv_in.weight", "decoder.conv_in.weight"), vae_diffusers(), ignored=_MARKS,
    ),
    Format("text", "official", ("token_embedding.weight", "blocks.0.attn.q.weight"), ignored=_MARKS),
    Format(
        "text", "transformers", ("encoder.block.0.layer.0.SelfAttention.q.weight",), TEXT_TRANSFORMERS,
        ignored=(*_MARKS, "spiece_model"), aliases=(("shared.weight", "encoder.embed_tokens.weight"),),
    ),
    Format(
        "clip", "official", ("visual.cls_embedding", "visual.patch_embedding.weight"),
        ignored=(*_MARKS, r"textual\..*", "log_scale"),
    ),
    Format(
        "clip", "transformers", ("embeddings.class_embedding", "embeddings.patch_embedding.weight"),
        CLIP_TRANSFORMERS, prefixes=("", "vision_model."),
        ignored=(*_MARKS, r"embeddings\.position_ids", r"text_model\..*", "logit_scale", r"text_projection\.weight"),
    ),
    # The older files call the two halves of the normalised convolution g and v; a CTC model has a head besides.
    Format(
        "audio", "official", ("feature_extractor.conv_layers.0.conv.weight", "feature_projection.projection.weight"),
        prefixes=("", "wav2vec2."), ignored=(*_MARKS, r"lm_head\..*", "masked_spec_embed"),
        aliases=(
            ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "encoder.pos_conv_embed.conv.weight_g"),
            ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.pos_conv_embed.conv.weight_v"),
        ),
    ),
)  # fmt: skip

# Suffixes of the tensors that make a quantised weight whole: `X.weight` stands for X.weight * scale.
SCALES = (".scale_weight", ".weight_scale")
# Scales of activations belong to fp8 arithmetic, which is not done here: values are dequantised.
INPUT_SCALES = (".scale_input", ".input_scale")

# Official tensors that a checkpoint may lack and a module may not want.
OPTIONAL = ("visual.head",)


def format_of(names: Iterable[str]) -> tuple[Format, str] | None:
    """The format of a set of tensor names and the prefix they stand under, or None when nobody calls them so."""
    names = frozenset(names)
    for found in FORMATS:
        prefix = found.prefix_of(names)
        if prefix is not None:
            return (_vae_format(names, prefix) if (found.kind, found.name) == ("vae", "diffusers") else found), prefix
    return None


def _vae_format(names: frozenset[str], prefix: str) -> Format:
    """The diffusers format of this very VAE: its rules depend on how many blocks a stage has."""
    blocks = sum(f"{prefix}decoder.up_blocks.0.resnets.{k}.conv1.weight" in names for k in range(64)) - 1
    residual = f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in names
    return get_format("vae", "diffusers", blocks=max(blocks, 1), residual=residual)


def get_format(kind: str, name: str, *, blocks: int = VAE_21.blocks, residual: bool = False) -> Format:
    """The format of this name; `blocks` and `residual` (of a VaeConfig) matter for diffusers' VAE only."""
    found = next(row for row in FORMATS if (row.kind, row.name) == (kind, name))
    if (kind, name) == ("vae", "diffusers"):
        rules = vae_diffusers(blocks, residual=residual)
        return Format(kind, name, found.telling, rules, found.prefixes, found.ignored)
    return found


def by_official_name(format_: Format, names: Iterable[str], prefix: str = "") -> dict[str, tuple[tuple[str, ...], str]]:
    """Official name -> (the names its parts have here, in order; operation), without what the format ignores.

    KeyError for a name that the format does not have.
    """
    parts: dict[str, dict[int, str]] = {}
    operations: dict[str, str] = {}
    for name in names:
        inner = name.removeprefix(prefix)
        if format_.ignores(inner):
            continue
        found = format_.official(inner)
        if found is None:
            raise KeyError(name)
        parts.setdefault(found[0], {})[found[1]] = name
        operations[found[0]] = found[2]
    return {name: (tuple(row[i] for i in sorted(row)), operations[name]) for name, row in parts.items()}
