"""Every released model as one row of data: sizes, experts, defaults, where its files are published.

A new model is a new row, and most rows are a `replace()` of another.  Rows name conditioners by string, so that this
module, and with it `--help`, `plan` and `models`, loads no torch.  Numbers are the official configurations
(wan/configs/*.py of Wan2.2 and Wan2.1); the demo rows are models this project trained and ships.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanloom.errors import InputError, did_you_mean
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

# The official negative prompts. The unconditional branch of every published model was meant to see this text: an empty
# negative prompt is replaced by it, so the wording is part of the model (garish colours, overexposed, static, ...).
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_I2V_21 = "镜头晃动，" + NEGATIVE  # camera shake
NEGATIVE_FLF_21 = "镜头切换，" + NEGATIVE_I2V_21  # scene cut

Size = tuple[int, int]  # width, height in pixels

SIZES_480P: tuple[Size, ...] = ((480, 832), (832, 480))
SIZES_720P: tuple[Size, ...] = ((720, 1280), (1280, 720))
SIZES_5B: tuple[Size, ...] = ((704, 1280), (1280, 704))
AREA_480P = 832 * 480

UMT5_XXL = TextConfig()


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that says nothing.  Guidance is (low-noise expert, high-noise expert), the official order."""

    size: Size = (1280, 720)
    frames: int = 81
    fps: int = 16
    steps: int = 40
    shift: float = 5.0
    shift_480p: float | None = None  # used instead of `shift` up to 832*480 pixels
    guidance: tuple[float, float] = (5.0, 5.0)
    sampler: str = "unipc"
    prompt: str = ""  # what a request without one gets; empty: it has to have one
    negative_prompt: str = NEGATIVE
    quality: int = 8  # of the mp4, 0..10 on the official scale (imageio): 8 is x264 with quantiser 10

    def shift_for(self, size: Size) -> float:
        """The shift of a video of this size (width, height)."""
        if self.shift_480p is not None and size[0] * size[1] <= AREA_480P:
            return self.shift_480p
        return self.shift


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file (or a set of shards) of a published checkpoint: which part it is, its name in the repository, bytes."""

    part: str  # dit, text, vae, clip, audio, tokenizer
    name: str
    bytes: int
    expert: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A released model as data.

    experts: (name, from_t) high noise first; an expert runs the steps with t >= from_t * 1000 that no earlier one
    took.  conditioner: "text", "image" (channels beside the noise) or "clean_frame" (first latent frame kept at t = 0);
    `images` says which pictures the task takes: name -> required.
    """

    name: str
    task: str
    about: str
    dit: DiTConfig
    experts: tuple[tuple[str, float], ...] = (("model", 0.0),)
    vae: VaeConfig = VAE_21
    text: TextConfig = UMT5_XXL
    clip: ClipConfig | None = None
    audio: AudioConfig | None = None
    conditioner: str = "text"
    inputs: tuple[tuple[str, bool], ...] = ()
    defaults: Defaults
    sizes: tuple[Size, ...] = SIZES_720P + SIZES_480P
    repos: tuple[str, ...] = ()
    files: tuple[PublishedFile, ...] = ()
    demo: bool = False

    @property
    def multiple(self) -> int:
        """Width and height are multiples of this: VAE stride times DiT patch (16; 32 for the 5B)."""
        return self.vae.stride[1] * self.dit.patch[1]

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.experts)

    def takes(self, role: str) -> bool:
        """Whether the task has a use for this input ("image", "last_image", "audio", "pose_video", ...)."""
        return any(name == role for name, _ in self.inputs)

    def needs(self, role: str) -> bool:
        return (role, True) in self.inputs

    def expert_at(self, t: float) -> str:
        """The expert that runs a step with timestep t in [0, 1000]."""
        return next(name for name, start in self.experts if t >= start * 1000)

    def guidance_of(self, expert: str, guidance: tuple[float, float]) -> float:
        """The scale of an expert's steps: `guidance` is (low, high), and high belongs to the first of two experts."""
        return guidance[1] if expert == self.experts[0][0] else guidance[0]


_TOKENIZER = PublishedFile(part="tokenizer", name="google/umt5-xxl/tokenizer.json", bytes=16_837_417)
_UMT5 = PublishedFile(part="text", name="models_t5_umt5-xxl-enc-bf16.pth", bytes=11_361_920_418)
_VAE_21_FILE = PublishedFile(part="vae", name="Wan2.1_VAE.pth", bytes=507_609_880)
_VAE_22_FILE = PublishedFile(part="vae", name="Wan2.2_VAE.pth", bytes=2_818_839_170)
_CLIP_FILE = PublishedFile(
    part="clip", name="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", bytes=4_772_359_140
)
_AUDIO_FILE = PublishedFile(part="audio", name="wav2vec2-large-xlsr-53-english/model.safetensors", bytes=1_261_942_732)
_SHARDS = "diffusion_pytorch_model-*.safetensors"


def _files(
    *dit: PublishedFile, vae: PublishedFile = _VAE_21_FILE, clip: bool = False, audio: bool = False
) -> tuple[PublishedFile, ...]:
    beside = (*((_CLIP_FILE,) if clip else ()), *((_AUDIO_FILE,) if audio else ()))
    return (*dit, vae, _UMT5, _TOKENIZER, *beside)


def _dit_file(name: str, parameters: int, expert: str | None = None) -> PublishedFile:
    """The published transformers are float32: four bytes a parameter (headers are below a thousandth)."""
    return PublishedFile(part="dit", name=name, bytes=4 * parameters, expert=expert)


def _expert_files(parameters: int) -> tuple[PublishedFile, PublishedFile]:
    high, low = "high_noise_model", "low_noise_model"
    return _dit_file(f"{high}/{_SHARDS}", parameters, high), _dit_file(f"{low}/{_SHARDS}", parameters, low)


T2V_A14B = Variant(
    name="t2v-A14B",
    task="t2v-A14B",
    about="Wan2.2, a video from text, two experts of 14 billion parameters",
    dit=DiTConfig(),
    experts=(("high_noise_model", 0.875), ("low_noise_model", 0.0)),
    defaults=Defaults(shift=12.0, guidance=(3.0, 4.0)),
    repos=("Wan-AI/Wan2.2-T2V-A14B",),
    files=_files(*_expert_files(14_288_491_584)),
)
I2V_A14B = replace(
    T2V_A14B,
    name="i2v-A14B",
    task="i2v-A14B",
    about="Wan2.2, a video from a first image (and a last one), two experts of 14 billion parameters",
    dit=DiTConfig(in_channels=36),
    experts=(("high_noise_model", 0.900), ("low_noise_model", 0.0)),
    conditioner="image",
    inputs=(("image", True), ("last_image", False)),
    defaults=Defaults(guidance=(3.5, 3.5)),
    repos=("Wan-AI/Wan2.2-I2V-A14B",),
    files=_files(*_expert_files(14_288_901_184)),
)
TI2V_5B = Variant(
    name="ti2v-5B",
    task="ti2v-5B",
    about="Wan2.2, a video from text, or text and a first image, 5 billion parameters",
    dit=DiTConfig(dim=3072, ffn_dim=14336, heads=24, layers=30, in_channels=48, out_channels=48),
    vae=VAE_22,
    conditioner="clean_frame",
    inputs=(("image", False),),
    defaults=Defaults(size=(1280, 704), frames=121, fps=24, steps=50),
    sizes=SIZES_5B,
    repos=("Wan-AI/Wan2.2-TI2V-5B",),
    files=_files(_dit_file(_SHARDS, 4_999_787_712), vae=_VAE_22_FILE),
)
# The negative prompt of the published configuration of s2v (blurred, agitated, shaking hands, subtitles, ...).
NEGATIVE_S2V = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
S2V_14B = Variant(
    name="s2v-14B",
    task="s2v-14B",
    about="Wan2.2, a picture that speaks, from a sound (and a pose video), 16 billion parameters",
    dit=DiTConfig(speech=SpeechConfig()),
    audio=AudioConfig(),
    conditioner="speech",
    inputs=(("image", True), ("audio", True), ("pose_video", False)),
    defaults=Defaults(size=(1024, 704), frames=80, shift=3.0, guidance=(4.5, 4.5), negative_prompt=NEGATIVE_S2V),
    sizes=(*SIZES_720P, *SIZES_480P, (704, 1024), (1024, 704), *SIZES_5B),
    repos=("Wan-AI/Wan2.2-S2V-14B",),
    files=_files(_dit_file(_SHARDS, 16_295_755_609), audio=True),
)
# Its published prompt, which the official command always takes: "the person in the video is performing actions".
PROMPT_ANIMATE = "视频中的人在做动作"
ANIMATE_14B = Variant(
    name="animate-14B",
    task="animate-14B",
    about="Wan2.2, a character that moves as a driving video does, 17 billion parameters and a CLIP image encoder",
    dit=DiTConfig(in_channels=36, image_dim=1280, animate=AnimateConfig()),
    clip=ClipConfig(),
    conditioner="animate",
    inputs=(
        ("image", True),
        ("pose_video", True),
        ("face_video", True),
        ("background_video", False),
        ("mask_video", False),
    ),
    defaults=Defaults(frames=77, fps=30, steps=20, guidance=(1.0, 1.0), prompt=PROMPT_ANIMATE),
    repos=("Wan-AI/Wan2.2-Animate-14B",),
    files=_files(_dit_file(_SHARDS, 17_274_816_884), clip=True),
)
T2V_14B = Variant(
    name="t2v-14B",
    task="t2v-14B",
    about="Wan2.1, a video from text, 14 billion parameters",
    dit=DiTConfig(),
    defaults=Defaults(steps=50),
    repos=("Wan-AI/Wan2.1-T2V-14B",),
    files=_files(_dit_file(_SHARDS, 14_288_491_584)),
)
T2V_1_3B = replace(
    T2V_14B,
    name="t2v-1.3B",
    task="t2v-1.3B",
    about="Wan2.1, a video from text, 1.4 billion parameters: the smallest published model",
    dit=DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=30),
    defaults=Defaults(size=(832, 480), steps=50),
    sizes=SIZES_480P,
    repos=("Wan-AI/Wan2.1-T2V-1.3B",),
    files=_files(_dit_file("diffusion_pytorch_model.safetensors", 1_418_996_800)),
)
I2V_14B = Variant(
    name="i2v-14B",
    task="i2v-14B",
    about="Wan2.1, a video from a first image, 14 billion parameters and a CLIP image encoder",
    dit=DiTConfig(in_channels=36, image_dim=1280),
    clip=ClipConfig(),
    conditioner="image",
    inputs=(("image", True),),
    defaults=Defaults(shift_480p=3.0, negative_prompt=NEGATIVE_I2V_21),
    repos=("Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-720P"),
    files=_files(_dit_file(_SHARDS, 16_394_878_784), clip=True),
)
FLF2V_14B = replace(
    I2V_14B,
    name="flf2v-14B",
    task="flf2v-14B",
    about="Wan2.1, a video between a first and a last image, 14 billion parameters and a CLIP image encoder",
    dit=DiTConfig(in_channels=36, image_dim=1280, image_positions=514),
    inputs=(("image", True), ("last_image", True)),
    defaults=Defaults(steps=50, shift=16.0, negative_prompt=NEGATIVE_FLF_21),
    repos=("Wan-AI/Wan2.1-FLF2V-14B-720P",),
    files=_files(_dit_file(_SHARDS, 16_395_536_704), clip=True),
)

# The demo models: the same architecture, small. They are trained with captions dropped out, so their unconditional
# text is the empty one. A checkpoint's own sizes (vocabulary, text length) are read from its files.
_DEMO_DIT = DiTConfig(dim=128, ffn_dim=384, heads=4, layers=6, text_dim=96, text_len=24)
_DEMO_VAE = VaeConfig(dim=16, decoder_dim=16, multipliers=(1, 1, 2, 4), blocks=1)
_PEOPLE_VAE = replace(_DEMO_VAE, multipliers=(1, 1, 2, 3))
_DEMO_DEFAULTS = Defaults(size=(64, 64), frames=17, fps=8, steps=20, guidance=(3.0, 4.0), negative_prompt="")

DEMO_T2V = Variant(
    name="demo-t2v",
    task="t2v-A14B",
    about="our own small model of moving shapes, from text; two experts, as Wan2.2 t2v-A14B",
    dit=_DEMO_DIT,
    experts=T2V_A14B.experts,
    vae=_DEMO_VAE,
    text=TextConfig(dim=96, ffn_dim=256, heads=4, head_dim=24, layers=2, vocab=128),
    defaults=_DEMO_DEFAULTS,
    sizes=((64, 64),),
    demo=True,
)
DEMO_I2V = replace(
    DEMO_T2V,
    name="demo-i2v",
    task="i2v-A14B",
    about="our own small model of moving shapes, from a first image; two experts, as Wan2.2 i2v-A14B",
    dit=replace(_DEMO_DIT, in_channels=36),
    experts=I2V_A14B.experts,
    conditioner="image",
    inputs=I2V_A14B.inputs,
    defaults=replace(_DEMO_DEFAULTS, guidance=(2.0, 2.0)),
)
DEMO_TI2V = replace(
    DEMO_T2V,
    name="demo-ti2v",
    task="ti2v-5B",
    about="our own small model of moving shapes, from text, or text and a first image, as Wan2.2 ti2v-5B",
    dit=replace(_DEMO_DIT, in_channels=48, out_channels=48),
    experts=TI2V_5B.experts,
    vae=replace(VAE_22, dim=16, decoder_dim=24, multipliers=(1, 1, 4, 4), blocks=1),
    conditioner="clean_frame",
    inputs=TI2V_5B.inputs,
    defaults=replace(_DEMO_DEFAULTS, size=(128, 128), guidance=(4.0, 4.0)),
    sizes=((128, 128),),
)
_PEOPLE_TEXT = TextConfig(dim=48, ffn_dim=96, heads=2, head_dim=24, layers=1, vocab=128)
_PEOPLE_DIT = DiTConfig(dim=128, ffn_dim=384, heads=4, layers=4, text_dim=48, text_len=24)
DEMO_S2V = Variant(
    name="demo-s2v",
    task="s2v-14B",
    about="our own small model of drawn heads that speak, from a picture and a sound, as Wan2.2 s2v-14B",
    dit=replace(_PEOPLE_DIT, speech=SpeechConfig(audio_dim=48, audio_states=3, layers=(0, 2))),
    vae=_PEOPLE_VAE,
    text=_PEOPLE_TEXT,
    audio=AudioConfig(dim=48, ffn_dim=96, heads=4, layers=2, conv_dim=(32,) * 7, positions=16, groups=4),
    conditioner="speech",
    inputs=S2V_14B.inputs,
    defaults=Defaults(size=(64, 64), frames=20, fps=16, steps=10, shift=3.0, guidance=(1.0, 1.0), negative_prompt=""),
    sizes=((64, 64),),
    demo=True,
)
DEMO_ANIMATE = Variant(
    name="demo-animate",
    task="animate-14B",
    about="our own small model of drawn figures that dance, from a picture and a pose video, as Wan2.2 animate-14B",
    dit=replace(
        _PEOPLE_DIT,
        layers=5,
        in_channels=36,
        image_dim=64,
        animate=AnimateConfig(layers=(0, 3), face_dim=16, motion_dim=32, directions=8, widths=(8, 8, 16, 16, 32)),
    ),
    vae=_DEMO_VAE,
    text=_PEOPLE_TEXT,
    clip=ClipConfig(dim=64, ffn_dim=128, heads=4, layers=3, patch=8, image=64, projection=64),
    conditioner="animate",
    inputs=ANIMATE_14B.inputs,
    defaults=Defaults(size=(96, 96), frames=17, fps=16, steps=10, shift=3.0, guidance=(1.0, 1.0), negative_prompt=""),
    sizes=((96, 96),),
    demo=True,
)

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        T2V_A14B, I2V_A14B, TI2V_5B, S2V_14B, ANIMATE_14B, T2V_1_3B, T2V_14B, I2V_14B, FLF2V_14B,
        DEMO_T2V, DEMO_I2V, DEMO_TI2V, DEMO_S2V, DEMO_ANIMATE,
    )
}  # fmt: skip

TASKS: tuple[str, ...] = tuple(row.task for row in VARIANTS.values() if not row.demo)


def variant_for(task: str, demo: bool = False) -> Variant:
    """The model that does `task` (an official task name, or a row's own name); with demo=True our small one.

    Errors: E2002 for an unknown task, E2001 for a task that has no demo model.
    """
    if task in VARIANTS and (VARIANTS[task].demo or not demo):
        return VARIANTS[task]
    if task not in TASKS:
        raise InputError("E2002", f"task: '{task}' is not known. {did_you_mean(task, TASKS)}")
    for row in VARIANTS.values():
        if row.demo and row.task == task:
            return row
    with_demo = ", ".join(row.task for row in VARIANTS.values() if row.demo)
    raise InputError("E2001", f"--ckpt-dir is required: {task} has no demo model (there are: {with_demo}).")
