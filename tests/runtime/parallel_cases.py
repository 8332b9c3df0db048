"""Every model that runs on several processes, small, and how one process's numbers are compared with those of many.

A case is a variant of `VARIANTS` with its sizes made small, or one of: `short`, fewer tokens than would give each of 4
processes one; `parts`, a part in each hook list that asks for the whole sequence; `lowrank`, where only two small
matrices beside each linear layer learn; `coarse`, linear layers of 8 bits, through which gradients only pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wanloom.models.adapters import build_dit
from wanloom.models.config import AnimateConfig, DiTConfig, SpeechConfig
from wanloom.models.dit import DiT
from wanloom.models.layers import Block, Scene, Trunk
from wanloom.runtime.attention import plain, use_kernel
from wanloom.runtime.layouts import Layout, choose_layout
from wanloom.runtime.parallel import guided_apart, open_mesh
from wanloom.runtime.sequence import Sequenced
from wanloom.runtime.sharding import shard
from wanloom.sampling.velocity import guided
from wanloom.variants import VARIANTS

BUILT_UP = ("short", "parts", "lowrank", "coarse")
IN_FLOAT32 = "casual_audio_encoder.weights"
WIDER = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
FRAMES, SIDE = 5, 10  # 125 tokens: 1 more than a multiple of 2 and of 4, 2 more than one of 3


def config_of(case: str) -> DiTConfig:
    """The sizes of a case; 12 heads are divided by 2, 3 and 4."""
    name = "t2v-A14B" if case in BUILT_UP else case
    dit = VARIANTS[name].dit
    return replace(
        dit, dim=72, ffn_dim=96, heads=12, layers=3, text_dim=10, text_len=5, freq_dim=16,
        image_dim=None if dit.image_dim is None else 12,
        image_positions=None if dit.image_positions is None else 14,
        speech=dit.speech and SpeechConfig(audio_dim=6, audio_states=3, layers=(0, 2)),
        animate=dit.animate and AnimateConfig(layers=(1,), face_dim=8, motion_dim=12, directions=4, widths=(4, 6, 6)),
    )  # fmt: skip


# Of variants that are the same when they are small, one.
CASES = (
    *dict(reversed([(config_of(name), name) for name, row in VARIANTS.items() if not row.demo])).values(),
    *BUILT_UP,
)


def build(case: str) -> DiT:
    """A float64 model with random values of unit gain: the same in every process."""
    dit = build_dit(config_of(case))
    if case == "parts":
        add_parts(dit)
    dit = dit.double()
    if case == "lowrank":
        dit.requires_grad_(False)
        replace_linears(dit, LowRank)
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for name, p in dit.named_parameters():
            r = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(1 + 0.1 * r)
            else:
                p.copy_(r * (0.2 if p.dim() < 2 or "modulation" in name else p[0].numel() ** -0.5))
    if case == "coarse":
        replace_linears(dit, Coarse)
    return dit


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ask(case: str, branch: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """x and t, and what `DiT.once` is given; another text for each branch of guidance."""
    config, side = config_of(case), 2 if case == "short" else SIDE
    extra = config.in_channels - config.out_channels
    batch = 2 if case in ("t2v-A14B", "short") else 1
    clean = case == "ti2v-5B" or config.speech is not None
    given = {"context": draw(batch, 4, config.text_dim, seed=10 + branch)}
    if extra:
        given["y"] = draw(batch, extra, FRAMES, side, side, seed=2)
    if config.image_dim is not None:
        given["image"] = draw(batch, config.image_positions or 9, config.image_dim, seed=3)
    if config.speech is not None:
        given |= {
            "audio": draw(1, 3, 6, 4 * FRAMES, seed=4),
            "reference": draw(1, 16, 1, side, side, seed=5),
            "motion": draw(1, 16, 19, side, side, seed=6),
            "pose": draw(1, 16, FRAMES, side, side, seed=7),
        }
    if config.animate is not None:
        size = config.animate.face_size
        given |= {
            "face": draw(1, 3, 4 * (FRAMES - 1) - 3, size, size, seed=8),
            "pose": draw(1, 16, FRAMES - 1, side, side, seed=9),
        }
    if clean:
        given["group"] = torch.tensor([int(case == "ti2v-5B")] + [0] * (FRAMES - 1))
    times = torch.tensor([[700.0, 0.0] if clean else [700.0]], dtype=torch.float64).expand(batch, -1)
    return {"x": draw(batch, config.out_channels, FRAMES, side, side, seed=1), "t": times}, given


def forward(dit: DiT, case: str, branch: int = 0) -> Tensor:
    """One pass, with all that is computed once for a clip."""
    dtype = next(dit.parameters()).dtype
    first, given = (
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
        for values in ask(case, branch)
    )
    return dit(**first, **dit.once(given))


def gradients(dit: DiT, out: Tensor) -> dict[str, Tensor]:
    """Of a loss that every token of the output has a say in."""
    (out * draw(*out.shape, seed=20).to(out.dtype)).sum().backward()
    return {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}


def far(many: Tensor, one: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((many - one).detach().abs().max() / one.detach().abs().max())


def far_gradients(many: dict[str, Tensor], one: dict[str, Tensor]) -> float:
    """The largest difference of any gradient, relative to the largest value in the same parameter's.

    A gradient that is zero but for rounding is held against a thousandth of the largest.  One that the model computes
    in float32 whatever its format is held to float32's precision, which is as far above float64's as `WIDER` says.
    """
    many = {name.replace("trunk.trunk.", "trunk."): gradient for name, gradient in many.items()}
    assert many.keys() == one.keys()
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in one.values())
    return max(
        float((many[name] - one[name]).abs().max())
        / max(float(one[name].abs().max()), least)
        / (WIDER if name.endswith(IN_FLOAT32) else 1)
        for name in one
    )


# ---------------------------------------------------------------- parts in all hook lists, and low rank


class References(nn.Module):
    """prepare: appends clean tokens outside the clip, and gives every token one of an adapter's own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 7, dim))

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        x = torch.cat((x, self.tokens.expand(x.shape[0], -1, -1)), 1)
        ones = scene.group.new_ones(7)
        return x, replace(
            scene,
            rope=torch.cat((scene.rope, scene.rope[:7])),
            group=torch.cat((scene.group, 0 * ones)),
            frame=torch.cat((scene.frame, -ones)),
            tokens={"control": x.sin()},
        )


class Hints(nn.Module):
    """enter: runs a block of its own on the control tokens and leaves a hint for a later block, as VACE does."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.block = Block(config.dim, config.ffn_dim, config.heads, config.eps)

    def forward(self, x: Tensor, scene: Scene) -> Scene:
        return replace(scene, tokens={**scene.tokens, "hint": self.block(x + scene.tokens["control"], scene)})


class AddHint(nn.Module):
    """after: adds the hint."""

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        return x + 0.1 * scene.tokens["hint"]


class Speaker(nn.Module):
    """after_cross: scores each token against the first ones, by a maximum over all tokens, as MultiTalk does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, dim)

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        first = scene.whole(self.key(x))[:, :25]
        score = (x @ first.transpose(1, 2)).mean(-1, keepdim=True)
        return x * (1 + 0.1 * score / scene.whole(score).abs().amax(1, keepdim=True))


def add_parts(dit: DiT) -> None:
    dit.prepare.append(References(dit.config.dim))
    dit.trunk.enter.append(Hints(dit.config))
    dit.blocks[1].after_cross.append(Speaker(dit.config.dim))
    dit.blocks[1].after.append(AddHint())


class LowRank(nn.Module):
    """A linear layer that stays as it is, and two small matrices beside it that learn."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


class Coarse(nn.Module):
    """A linear layer whose weights are whole numbers times a scale: one for each row."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def replace_linears(dit: DiT, kind: Callable[[nn.Linear], nn.Module]) -> None:
    for block in dit.blocks:
        linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, kind(linear))


# ---------------------------------------------------------------- what each process does

FORWARD, BACKWARD, SINGLE = "forward", "backward", "float32"


def sequence_layouts(world: int) -> list[Layout]:
    return [Layout(1, ring, world // ring) for ring in range(1, world + 1) if world % ring == 0]


def mean(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over the processes; of DTensors, which FSDP2 has averaged, the whole."""
    for name, gradient in sorted(gradients.items()):
        if isinstance(gradient, DTensor):
            gradients[name] = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients


def sequenced(dit: DiT, layout: Layout) -> DiT:
    assert isinstance(dit.trunk, Trunk)
    dit.trunk = Sequenced(dit.trunk, open_mesh(layout, "cpu"))
    return dit


def cut_tokens(cases: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Sequence parallelism in all layouts of this world -> how far each case is from one process."""
    far_off: dict[str, dict[str, float]] = {}
    for case in cases:
        alone = build(case)
        one = forward(alone, case)
        one_gradients = gradients(alone, one)
        for layout in sequence_layouts(dist.get_world_size()):
            dit = sequenced(build(case), layout)
            many = forward(dit, case)
            found = far_off[f"{case}, {layout}"] = {FORWARD: far(many, one)}
            found[BACKWARD] = far_gradients(mean(gradients(dit, many)), one_gradients)
            use_kernel(dit, plain)  # a kernel that is chosen afterwards does not undo the exchange
            with torch.no_grad():
                found[SINGLE] = far(forward(dit.float(), case).double(), one)
    return far_off


def cut_guidance(cases: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Two branches of guidance, and in a world of four each of them cut in both ways."""
    rest = dist.get_world_size() // 2
    far_off: dict[str, dict[str, float]] = {}
    for case in cases:
        x = ask(case)[0]["x"]

        def branches(dit: DiT, case: str = case) -> list[Callable[[Tensor, float], Tensor]]:
            return [lambda x, t, branch=branch: forward(dit, case, branch) for branch in (0, 1)]  # type: ignore[misc]

        alone = build(case)
        one = guided(*branches(alone), 3.5)(x, 700.0)
        one_gradients = gradients(alone, one)
        for layout in [replace(layout, cfg=2) for layout in sequence_layouts(rest)]:
            mesh = open_mesh(layout, "cpu")
            dit = build(case)
            if rest > 1:
                assert isinstance(dit.trunk, Trunk)
                dit.trunk = Sequenced(dit.trunk, mesh)
            many = guided_apart(*branches(dit), 3.5, mesh)(x, 700.0)
            found = far_off[f"{case}, {layout}"] = {FORWARD: far(many, one)}
            found[BACKWARD] = far_gradients(mean(gradients(dit, many)), one_gradients)
            with torch.no_grad():  # the same bits as one after the other
                both = guided(*branches(dit), 3.5)(x, 700.0)
                found["bits"] = float((guided_apart(*branches(dit), 3.5, mesh)(x, 700.0) != both).sum())
                alike = guided_apart(*branches(dit), 1, mesh)(x, 700.0)
                found["scale 1"] = float((alike != branches(dit)[0](x, 700.0)).sum())
    return far_off


def cut_weights(cases: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """FSDP2 alone, and with the tokens cut as well."""
    world = dist.get_world_size()
    far_off: dict[str, dict[str, float]] = {}
    for case in cases:
        alone = build(case)
        one = forward(alone, case)
        one_gradients = gradients(alone, one)
        for layout in (None, choose_layout(world, 12, False)):
            dit = build(case)
            whole = sum(p.numel() for p in dit.parameters())
            if layout is not None:
                sequenced(dit, layout)
            shard(dit, "cpu")
            kept = sum(p.to_local().numel() for p in dit.parameters() if isinstance(p, DTensor))
            many = forward(dit, case)
            found = far_off[f"{case}, weights{'' if layout is None else ' and tokens'} / {world}"] = {}
            found |= {FORWARD: far(many, one), "kept": kept / whole}
            found[BACKWARD] = far_gradients(mean(gradients(dit, many)), one_gradients)
            with torch.no_grad():
                found["without gradients"] = far(forward(dit, case), one)
    return far_off


LIMITS = {  # relative; measured 1e-15 forward, 1e-14 backward, 6e-7 in float32
    FORWARD: 1e-12, BACKWARD: 1e-12, SINGLE: 1e-5, "without gradients": 1e-12, "bits": 0, "scale 1": 0, "kept": 0.6,
}  # fmt: skip


def check(found: dict[str, dict[str, float]], count: int) -> None:
    """Every case was tried and none is farther off than `LIMITS`."""
    assert len(found) == count, sorted(found)
    bad = {case: far_off for case, far_off in found.items() if any(far_off[name] > LIMITS[name] for name in far_off)}
    assert not bad and all(value == value for far_off in found.values() for value in far_off.values()), bad
