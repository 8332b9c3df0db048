"""From the inputs of a task to what the transformer reads beside the noise: one file for each kind of task.

A conditioner is a function (parts, plan, media) -> Conditioning; `pipeline.CONDITIONERS` has them by the name that the
rows of `variants.py` use.  Tasks whose video is made clip by clip also have a class `Clips`, which says what each clip
is given beside that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What `DiT.once` takes for both passes of guidance, latents to hold, and what is decoded.

    cond, uncond: context [1, text_len, text_dim], y [1, Cy, T, h, w], image [1, 257 or 514, dim], group [T], and what
    the parts of an adapter read, [1, ...]; uncond is None when no step is guided, and else has the same names and
    shapes, as both passes may be made at once.  clean [1, C, n, h, w]: the first n latent frames, which are given and
    not generated.  lead [1, C, n, h, w]: latents that the decoder gets before those of the clip; drop: latent frames at
    the start of the clip that it does not get.
    """

    cond: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None = None
    clean: Tensor | None = None
    lead: Tensor | None = None
    drop: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with every tensor changed; a tensor that both passes share stays shared."""
        changed: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in changed:
                changed[id(tensor)] = change(tensor)
            return changed[id(tensor)]

        return Conditioning(
            {name: once(value) for name, value in self.cond.items()},
            None if self.uncond is None else {name: once(value) for name, value in self.uncond.items()},
            None if self.clean is None else once(self.clean),
            None if self.lead is None else once(self.lead),
            self.drop,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of it under flat names ("cond.context"); `from_tensors` is the way back."""
        flat = {f"cond.{name}": value for name, value in self.cond.items()}
        for name, value in (self.uncond or {}).items():
            if value is not self.cond.get(name):  # what both passes share is kept once
                flat[f"uncond.{name}"] = value
        return flat if self.clean is None else {**flat, "clean": self.clean}

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> Conditioning:
        """What `tensors` wrote."""
        split = {
            side: {name.partition(".")[2]: value for name, value in flat.items() if name.startswith(f"{side}.")}
            for side in ("cond", "uncond")
        }
        cond, own = split["cond"], split["uncond"]
        return cls(cond, {**cond, **own} if own else None, flat.get("clean"))
