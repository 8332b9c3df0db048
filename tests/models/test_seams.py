"""What machines do to a model from outside, and what adapters add to it, without the model knowing.

A model with parts in all four hook lists is cut among 2 and 3 processes, compiled block by block, has its trunk and
its linear layers replaced, and must give the same numbers each time.  The parts are small stand-ins for speech
(FrameCross), reference tokens, control hints and speakers.  52 tokens: they must be padded for 3 processes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from wanloom.models.adapters.frames import FrameCross
from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT, init_for_training
from wanloom.models.layers import Block, Kernel, Scene

CONFIG = DiTConfig(
    dim=48, ffn_dim=96, heads=6, layers=3, in_channels=4, out_channels=4, text_dim=10, text_len=5, image_dim=12
)
REFERENCES, GRID = 7, (3, 6, 10)  # 3 * 3 * 5 tokens and 7 of references


# ---------------------------------------------------------------- an adapter with a part in each hook list


class References(nn.Module):
    """prepare: appends clean tokens outside the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, REFERENCES, CONFIG.dim))

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        x = torch.cat((x, self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)), 1)
        ones = scene.group.new_ones(REFERENCES)
        still = scene.rope[:1].expand(REFERENCES, -1, -1)
        return x, replace(
            scene,
            rope=torch.cat((scene.rope, still)),
            group=torch.cat((scene.group, ones)),
            frame=torch.cat((scene.frame, -ones)),
            tokens={"control": x.sin()},
        )


class Speech(nn.Module):
    """prepare: puts the memory that FrameCross reads into the scene."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, GRID[0], 4, CONFIG.dim))

    def forward(self, x: Tensor, scene: Scene) -> tuple[Tensor, Scene]:
        return x, replace(scene, shared={"speech": self.memory, "first": GRID[1] * GRID[2] // 4})


class Hints(nn.Module):
    """enter: runs a block of its own on control tokens and leaves a hint for a later block (as VACE does)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(CONFIG.dim, CONFIG.ffn_dim, CONFIG.heads, CONFIG.eps)

    def forward(self, x: Tensor, scene: Scene) -> Scene:
        hint = self.block(x + scene.tokens["control"], replace(scene, image=None))
        return replace(scene, tokens={**scene.tokens, "hint": hint})


class AddHint(nn.Module):
    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        return x + 0.1 * scene.tokens["hint"]


class Speaker(nn.Module):
    """after_cross: scores each token against the first frame's tokens, by a maximum over all tokens (as MultiTalk)."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(CONFIG.dim, CONFIG.dim)

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        first = scene.whole(self.key(x))[:, : scene.shared["first"]]
        score = (x @ first.transpose(1, 2)).mean(-1, keepdim=True)
        return x * (1 + 0.1 * score / scene.whole(score).abs().amax(1, keepdim=True))


def build() -> tuple[DiT, dict[str, Tensor]]:
    torch.manual_seed(0)
    dit = init_for_training(DiT(CONFIG), torch.Generator().manual_seed(0))
    nn.init.normal_(dit.head.head.weight, 0, 0.1)
    dit.prepare.extend([References(), Speech()])
    dit.trunk.enter.append(Hints())
    dit.blocks[0].after.append(FrameCross("speech", CONFIG.dim, CONFIG.heads, CONFIG.eps))
    dit.blocks[1].after_cross.append(Speaker())
    dit.blocks[1].after.append(AddHint())
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ask = {
        "x": draw(1, 4, *GRID),
        "t": torch.tensor([[700.0, 0.0]]),
        "context": draw(1, 4, 10),
        "image": draw(1, 257, 12),
        "group": torch.tensor([1, 0, 0]),
    }
    return dit.double(), ask


def gradients(dit: DiT, ask: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = dit(**ask)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- the sequence cut among processes


class Gather(torch.autograd.Function):
    """[B, L/P, *] -> [B, L, *]; backward sums what all ranks ask of this part."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, t.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), 1)[dist.get_rank()]


class Swap(torch.autograd.Function):
    """Cut one dimension among the ranks and join another; its backward is itself the other way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cut: int, join: int) -> Tensor:
        ctx.dims = cut, join
        parts = torch.stack([p.contiguous() for p in t.chunk(dist.get_world_size(), cut)])
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts)
        return torch.cat(got.unbind(), join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cut, join = ctx.dims
        return Swap.apply(grad, join, cut), None, None


def by_heads(kernel: Kernel, length: Callable[[], int]) -> Kernel:
    """All tokens of some heads on each rank while the kernel runs; padded keys are cut off, so no mask is needed."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (Swap.apply(t, 2, 1) for t in (q, k, v))
        return Swap.apply(kernel(q, k[:, : length()], v[:, : length()], mask), 1, 2)

    return run


def cut_sequence(dit: DiT) -> None:
    """Put sequence parallelism on from outside: hooks at the edges of the trunk, a wrapped kernel in each block."""
    world, rank, state = dist.get_world_size(), dist.get_rank(), {}

    def part(t: Tensor, dim: int) -> Tensor:
        end = t.narrow(dim, t.shape[dim] - 1, 1)  # pad with the last token; `whole` drops it
        return torch.cat([t] + [end] * (-t.shape[dim] % world), dim).chunk(world, dim)[rank]

    def whole(t: Tensor) -> Tensor:
        return Gather.apply(t)[:, : state["length"]]

    def enter(_: nn.Module, args: tuple[Tensor, Scene]) -> tuple[Tensor, Scene]:
        x, scene = args
        state["length"] = x.shape[1]
        cut = {name: part(getattr(scene, name), 0) for name in ("rope", "group", "frame")}
        tokens = {name: part(t, 1) for name, t in scene.tokens.items()}
        return part(x, 1), replace(scene, **cut, tokens=tokens, whole=whole)

    dit.trunk.register_forward_pre_hook(enter)
    dit.trunk.register_forward_hook(lambda _, args, x: whole(x))
    for block in dit.modules():
        if isinstance(block, Block):
            block.self_attn.kernel = by_heads(block.self_attn.kernel, lambda: state["length"])


def compare_with_one_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine without a network has this one
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    one, one_gradients = gradients(*build())
    dit, ask = build()
    cut_sequence(dit)
    many, many_gradients = gradients(dit, ask)
    worst = {"output": (one - many).abs().max().item()}
    assert one_gradients.keys() == many_gradients.keys()
    for name, gradient in sorted(many_gradients.items()):
        if name.startswith(("blocks.", "trunk.")):
            # A rank has the gradient of its own tokens, counted once by every rank's loss.
            dist.all_reduce(gradient)
            worst[name] = (gradient / world - one_gradients[name]).abs().max().item()
    if rank == 0:
        torch.save(worst, f"{folder}/worst")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_a_sequence_cut_among_processes_gives_the_numbers_of_one(world: int, tmp_path: Path) -> None:
    mp.spawn(compare_with_one_process, (world, str(tmp_path)), nprocs=world)
    worst = torch.load(tmp_path / "worst", weights_only=True)
    assert len(worst) > 60  # every parameter of every block and part was compared
    assert max(worst.values()) < 1e-11, max(worst, key=worst.__getitem__)  # float64; measured 1e-14


# ---------------------------------------------------------------- the other seams


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
@torch.no_grad()
def test_each_block_compiles_as_one_graph() -> None:
    dit, ask = build()
    plain = dit(**ask)
    torch.compiler.reset()
    for block in dit.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(dit(**ask), plain, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


class Reuse(nn.Module):
    """A stand-in for the trunk that gives again what it gave before."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.last, self.runs = trunk, None, 0

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        if self.last is None:
            self.runs += 1
            self.last = self.trunk(x, scene) - x
        return x + self.last


@torch.no_grad()
def test_a_stand_in_for_the_trunk_runs_in_its_place_and_changes_no_name() -> None:
    dit, ask = build()
    plain, names = dit(**ask), [n for n in dit.state_dict() if not n.startswith("trunk.")]
    dit.trunk = Reuse(dit.trunk)
    torch.testing.assert_close(dit(**ask), plain, rtol=1e-12, atol=1e-12)
    dit(**ask)
    assert dit.trunk.runs == 1
    assert [n for n in dit.state_dict() if not n.startswith("trunk.")] == names


class LowRank(nn.Module):
    """A stand-in for nn.Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@torch.no_grad()
def test_every_linear_layer_can_be_replaced() -> None:
    dit, ask = build()
    merged = build()[0]
    linears = [name for name, module in dit.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        low = LowRank(dit.get_submodule(name))
        setattr(dit.get_submodule(parent), leaf, low)
        merged.get_submodule(name).weight += low.up.weight @ low.down.weight
    assert len(linears) > 40
    torch.testing.assert_close(dit(**ask), merged(**ask), rtol=1e-10, atol=1e-10)


def test_a_quantised_stand_in_may_store_its_weight_in_any_type() -> None:
    class Coarse(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("weight", base.weight.detach().to(torch.float8_e4m3fn))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).T

    dit, ask = build()
    dit = dit.float()
    ask = {name: value.float() if value.is_floating_point() else value for name, value in ask.items()}
    for block in dit.blocks:
        block.self_attn.q, block.ffn[0] = Coarse(block.self_attn.q), Coarse(block.ffn[0])
    with torch.no_grad():
        assert dit(**ask).isfinite().all()


@torch.no_grad()
def test_appended_tokens_are_seen_by_the_clip_and_do_not_leave() -> None:
    dit, ask = build()
    out = dit(**ask)
    assert out.shape == (1, 4, *GRID)
    dit.prepare[0].tokens += 1
    assert (dit(**ask) - out).abs().max() > 1e-4
