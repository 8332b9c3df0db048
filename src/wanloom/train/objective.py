"""What is learned: the loss of a batch.  Later objectives (LoRA's is the same, distillation, RL) stand beside these.

Flow matching as the samplers use it: x_s = (1-s) x0 + s e, target v = e - x0, model time t = 1000 s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.models.vae import CausalVae
from wanloom.train.recipe import Flow, VaeLoss


def sample_sigmas(count: int, flow: Flow, generator: torch.Generator) -> Tensor:
    """`count` noise levels [count] in [flow.low, flow.high], density of the shifted schedule, stratified.

    Sampling by inverse CDF inside the range is exact: sigma = shift u / (1 + (shift - 1) u) with u uniform between the
    preimages of the range's ends.
    """

    def unshift(sigma: float) -> float:
        return sigma / (flow.shift - (flow.shift - 1) * sigma)

    low, high = unshift(flow.low), unshift(flow.high)
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    u = low + (high - low) * u
    return flow.shift * u / (1 + (flow.shift - 1) * u)


@dataclass(frozen=True)
class FlowBatch:
    """x0 [B,C,F,h,w] normalised latents; the model's other inputs; what of them is given clean, or means nothing.

    inputs: what `DiT.once` takes beside the text: y, reference, audio, ...  With a `group` among them the tokens of
    group 1 are clean.
    """

    x0: Tensor
    context: Tensor  # [B, L, text_dim]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    held: Tensor | None = None  # [B] bool: the first latent frame is given (TI2V)
    live: Tensor | None = None  # [C] bool: the channels that carry anything, where some do not
    weight: Tensor | None = None  # [B, 1, F, h, w]: how much each place counts, where not all count alike


def flow_loss(forward: Callable[..., Tensor], batch: FlowBatch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared velocity error: (scalar, per-sample [B]).

    With `held` samples the first latent frame is clean, its tokens get t = 0, and it is left out of the loss.  Channels
    that are not `live` are left out too: all there is to say of them is the noise that was put in.
    """
    s = sigma.view(-1, 1, 1, 1, 1)
    x = torch.lerp(batch.x0, noise, s)
    target = noise - batch.x0
    t = 1000 * sigma[:, None]  # [B, 1]
    options = dict(batch.inputs)
    if "group" in options:
        t = torch.cat([t, torch.zeros_like(t)], 1)
    if batch.held is not None:
        x = x.clone()
        x[:, :, :1] = torch.where(batch.held.view(-1, 1, 1, 1, 1), batch.x0[:, :, :1], x[:, :, :1])
        t = torch.cat([t, torch.where(batch.held[:, None], torch.zeros_like(t), t)], 1)  # [B, 2]
        options["group"] = (torch.arange(x.shape[2], device=x.device) == 0).long()
    v = forward(x, t, batch.context, **options)
    error = (v.float() - target).square()
    if batch.live is not None:
        error = error[:, batch.live]
    if batch.weight is not None:
        error = error * (batch.weight / batch.weight.mean((1, 2, 3, 4), keepdim=True))
    if batch.held is None:
        each = error.mean((1, 2, 3, 4))
        return each.mean(), each
    weight = torch.ones(x.shape[0], 1, x.shape[2], 1, 1, device=x.device)
    weight[:, :, 0] = (~batch.held).float().view(-1, 1, 1, 1)
    each = (error * weight).mean((1, 3, 4)).sum(1) / weight.mean((1, 3, 4)).sum(1)
    return each.mean(), each


def soft_abs(x: Tensor, width: float = 0.02) -> Tensor:
    """|x|, rounded off below `width`: where the error is as small as bf16's rounding, its sign is noise, not news."""
    return (x.square() + width**2).sqrt() - width


def vae_loss(
    vae: CausalVae,
    video: Tensor,
    weights: VaeLoss,
    step: int,
    noise: Tensor,
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction and KL of a clip [B,3,F,H,W] in [-1, 1]; `noise` draws the posterior sample.

    project: what is kept of the latents, where that is not all.
    """
    mu, logvar = vae.moments(video)
    mu, logvar = mu.float(), logvar.float().clamp(-20, 10)
    z = (mu if project is None else project(mu)) + noise * (0.5 * logvar).exp()
    out = vae.render(z)
    difference = out - video
    l1, mse = soft_abs(difference).mean(), difference.square().mean()
    edges = soft_abs(difference.diff(dim=-1)).mean() + soft_abs(difference.diff(dim=-2)).mean()
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
    ramp = min(1.0, (step + 1) / max(1, weights.kl_ramp))
    loss = weights.l1 * l1 + weights.mse * mse + weights.gradient * edges + ramp * weights.kl * kl
    psnr = -10 * torch.log10(F.mse_loss(out.detach().clamp(-1, 1), video) / 4)
    figures = torch.stack([l1, kl, psnr]).tolist()
    return loss, {"l1": figures[0], "kl": figures[1], "psnr": figures[2]}
