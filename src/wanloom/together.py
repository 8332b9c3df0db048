"""Parts that several processes compute together: the transformer, whose tokens and weights are cut among them, and the
VAE, whose rows are.

The first process runs the pipeline, alone in knowing of files, steps and events; where its pipeline asks for a
transformer or a VAE, every process brings one in, and each call of it is an order to all (`runtime/crew.py`).  So
nothing that a run keeps - state, seeds, job folder - depends on how many processes there are.

    crew, board = meet(place)
    Pipeline(variant, files, device=..., make_parts=partial(Together, crew=crew, layout=layout))    # the first
    serve(crew)                                                                                     # every other

All other parts run on the first process, while the others wait; the text encoder, too, unless its weights are cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanloom import pulse
from wanloom.checkpoint.find import Files
from wanloom.checkpoint.load import load_into, survey
from wanloom.checkpoint.weights import Weights
from wanloom.durable import failpoint
from wanloom.errors import InputError
from wanloom.models.layers import use_ops
from wanloom.models.vae import CausalVae
from wanloom.parts import Parts, out_of_memory
from wanloom.runtime.attention import use_kernel
from wanloom.runtime.crew import Crew
from wanloom.runtime.fused import FUSED
from wanloom.runtime.layouts import Layout
from wanloom.runtime.neighbours import deal_out
from wanloom.runtime.parallel import gather, open_mesh
from wanloom.runtime.sequence import Sequenced
from wanloom.runtime.sharding import shard, share_of
from wanloom.shares import held_bytes
from wanloom.variants import VARIANTS, Variant

KEPT = 2  # what was given for a clip: one for each branch of guidance


class Together(Parts):
    """The parts of a model among the processes of `crew`, laid out as `layout`.

    cut: which parts' weights are cut among the processes ("dit", "text"), so that none holds them whole.
    vae_parallel: whether each has its rows of what the VAE makes; False: the first has all of them.
    others: as for `Parts`; the first process's are told to the others.
    """

    def __init__(
        self, variant: Variant, files: Files, *, crew: Crew, layout: Layout, cut: Sequence[str] = (),
        vae_parallel: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(variant, files, **options)
        self.crew, self.layout, self.cut = crew, layout, tuple(cut)
        self.vae_parallel = self.vae_shared = vae_parallel
        self._numbers = count()  # of uses: one may begin before another has ended
        self._kind = torch.device(self.device).type
        if crew.first:
            told = {**options, "resident": bool(self.staying)}
            del told["device"]
            crew.tell("parts", self._kind, variant.name, _texts(files), asdict(layout), self.cut, vae_parallel, told)
        with crew.exchange():
            self.mesh = open_mesh(layout, self._kind)

    @property
    def held(self) -> Mapping[str, int]:
        return held_bytes(self.variant, self.dtype, dict.fromkeys(self.cut, self.layout.world))

    @property
    def company(self) -> dict[str, str]:
        return {"processes": f"{self.layout}{'' if self.vae_parallel else ', the VAE on the first'}"}

    def wear(self, lora: Path | None) -> None:
        if self.crew.first:
            self.crew.tell("wear", None if lora is None else str(lora.absolute()))
        super().wear(lora)

    def keep(self, staying: frozenset[str], resident_blocks: int | None, *, text_streamed: bool) -> None:
        if self.crew.first:
            self.crew.tell("keep", sorted(staying), resident_blocks, text_streamed)
        super().keep(staying, resident_blocks, text_streamed=text_streamed)

    def release(self) -> None:
        if self.crew.first:
            self.crew.tell("release")
        super().release()

    @contextmanager
    def use(self, part: str, expert: str | None = None) -> Iterator[Any]:
        """On the first process: of a shared part what is called as the part is, and asks all."""
        if not self._is_shared(part):
            with super().use(part, expert) as module:
                yield module
            return
        number = next(self._numbers)
        self.crew.tell("use", number, part, expert)
        try:
            with self.hold(part, expert) as own:
                yield ASKED[part](own, self, number)
        finally:
            self.crew.tell("leave", number)

    @contextmanager
    def hold(self, part: str, expert: str | None) -> Iterator[Any]:
        """This process's own of a shared part, for as long as the block lasts."""
        with super().use(part, expert) as module:
            yield OWN[part](module, self)

    def _is_shared(self, part: str) -> bool:
        shared = {"dit": True, "text": "text" in self.cut, "vae": self.vae_shared, "decoder": self.vae_shared}
        return shared.get(part, False)

    def _load(self, part: str, expert: str | None) -> nn.Module:
        module = super()._load(part, expert)
        if part != "dit":  # which beats by itself, with every exchange
            for inner in module.modules():
                inner.register_forward_hook(_beat)
        return module

    def _cut_rows(self, vae: CausalVae, aside: str | None) -> None:
        if self.vae_shared:
            deal_out(vae, rows=self.vae_rows, aside=aside)
        else:
            super()._cut_rows(vae, aside)

    def _fill(self, part: str, module: nn.Module, weights: Weights, dtype: torch.dtype, device: str) -> None:
        if part in self.cut:
            self._fill_cut(module, weights, dtype, blocks=module.encoder.block)  # type: ignore[union-attr,arg-type]
        else:
            super()._fill(part, module, weights, dtype, device)

    def _fill_dit(self, dit: Any, weights: Weights, dtype: torch.dtype) -> None:
        if "dit" in self.cut:
            self._fill_cut(dit, weights, dtype)
            use_kernel(dit, self.kernel)
            if self.fused:
                use_ops(dit, FUSED)
        else:
            super()._fill_dit(dit, weights, dtype)
        dit.trunk = Sequenced(dit.trunk, self.mesh)

    def _fill_cut(
        self, module: nn.Module, weights: Weights, dtype: torch.dtype, blocks: Sequence[nn.Module] | None = None
    ) -> None:
        """Cut first and filled then: a process reads every tensor and keeps its part of it."""
        with self.crew.exchange():
            shard(module, self._kind, blocks)
        load_into(module, weights, dtype=dtype, device=self.device, keep=share_of(module))
        module.eval().requires_grad_(False)


def _beat(*_: Any) -> None:
    pulse.beat()


# ---------------------------------------------------------------- what each process does with its own of a shared part


class Branches:
    """This process's transformer, and what it was given for the clip under way, by number."""

    def __init__(self, dit: Any, parts: Together) -> None:
        self.dit, self.parts = dit, parts
        self.given: dict[int, Mapping[str, Any]] = {}

    def once(self, number: int, **inputs: Tensor) -> None:
        """`DiT.once` for what is `number` from now on."""
        with torch.no_grad(), self.parts.crew.exchange():
            self.given[number] = self.dit.once(inputs)
        for old in sorted(self.given)[:-KEPT]:
            del self.given[old]

    def forward(self, number: int, other: int | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The velocity under what is `number`, and under what is `other` where each has its half of the processes."""
        mesh = self.parts.mesh
        with torch.no_grad(), self.parts.crew.exchange():
            if other is None:
                return self.dit(x, t, **self.given[number]), None
            mine = (number, other)[mesh.get_local_rank("cfg")]
            v = self.dit(x, t, **self.given[mine])
            first, second = gather(v[None], 0, mesh.get_group("cfg")).unbind(0)
            return first, second


class Coder:
    """This process's VAE, and the stream under way: of latents to decode, or of pieces to encode."""

    def __init__(self, vae: CausalVae, parts: Together) -> None:
        self.vae, self.crew = vae, parts.crew
        self._given: deque[Tensor] = deque()  # the piece to encode next
        self._stream: Iterator[Tensor] = iter(())

    def decode(self, latents_per_chunk: int, z: Tensor) -> None:
        """Begin to decode, as `CausalVae.decode_chunks`."""
        self._stream = self.vae.decode_chunks(z, latents_per_chunk)

    def encode(self) -> None:
        """Begin to encode, as `CausalVae.encode_chunks`."""
        self._stream = self.vae.encode_chunks(iter(self._given.popleft, None))

    def piece(self, video: Tensor | None = None) -> Tensor:
        """The next piece, of `video` where there is something to encode.

        Error: E5007 when memory runs out on another process than the first, which has its own ways (`ladder.py`).
        """
        if video is not None:
            self._given.append(video)
        try:
            with torch.no_grad(), self.crew.exchange():
                return next(self._stream)
        except (RuntimeError, MemoryError) as error:
            if self.crew.first or not out_of_memory(error):
                raise
            cure = "Continue with --vae-parallel off, which lets the first process decode alone."
            raise InputError("E5007", f"memory: it ran out in its rows of the VAE. {cure}") from error


class Encoding:
    """This process's part of a text encoder whose weights are cut."""

    def __init__(self, encoder: Any, parts: Together) -> None:
        self.encoder, self.crew = encoder, parts.crew

    def encode(self, ids: Tensor) -> Any:
        with torch.no_grad(), self.crew.exchange():
            return self.encoder(input_ids=ids)


CALLS = {"once", "forward", "encode", "decode", "piece"}  # orders that are methods of these
OWN = {"dit": Branches, "vae": Coder, "decoder": Coder, "text": Encoding}


# ---------------------------------------------------------------- a shared part, as the first process calls it


class Asked:
    """A transformer of all processes, called on the first one as `DiT` is; see `sampling.velocity.conditioned`.

    With two halves, both branches of guidance are computed when the first is asked for, and the second is kept until
    it is.
    """

    def __init__(self, branches: Branches, parts: Together, use: int) -> None:
        self._branches, self._parts, self._use = branches, parts, use
        self._number = 0
        self._spare: tuple[int, Tensor, Tensor, Tensor] | None = None  # number, x, t, velocity

    def once(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """As `DiT.once`; what comes out stays on every process, and its number stands for it."""
        self._number += 1
        self._parts.crew.tell("once", self._use, self._number, **inputs)
        self._branches.once(self._number, **inputs)
        return {"number": self._number, **({"group": inputs["group"]} if "group" in inputs else {})}

    def __call__(self, x: Tensor, t: Tensor, *, number: int, group: Tensor | None = None) -> Tensor:
        """The velocity.  group: it is part of what has that number; only `conditioned` looks for it."""
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] == number and spare[1] is x and torch.equal(spare[2], t):
            return spare[3]
        halves = self._parts.layout.cfg == 2
        other = next((n for n in self._branches.given if n != number), None) if halves else None
        self._parts.crew.tell("forward", self._use, number, other, x=x, t=t)
        v, second = self._branches.forward(number, other, x, t)
        if other is not None and second is not None:
            self._spare = other, x, t, second
        return v


class AskedText:
    """A text encoder whose weights are cut: called on the first process as transformers' is."""

    def __init__(self, own: Encoding, parts: Together, use: int) -> None:
        self._own, self._crew, self._use = own, parts.crew, use
        self.shared = own.encoder.shared

    def __call__(self, input_ids: Tensor) -> Any:
        self._crew.tell("encode", self._use, ids=input_ids)
        return self._own.encode(input_ids)


class AskedVae:
    """A VAE of which each process computes its rows: called on the first process as `CausalVae` is.

    One stream at a time; what it remembers stays here and there, so no state goes in or comes out.
    """

    def __init__(self, coder: Coder, parts: Together, use: int) -> None:
        self._coder, self._crew, self._use = coder, parts.crew, use
        self.config, self.conv1, self.conv2 = coder.vae.config, coder.vae.conv1, coder.vae.conv2

    def encode(self, video: Tensor) -> tuple[Tensor, None]:
        """A whole clip in one piece."""
        return next(self.encode_chunks([video])), None

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        """A whole clip in one piece."""
        return next(self.decode_chunks(z, z.shape[2])), None

    def encode_chunks(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        self._crew.tell("encode", self._use)
        self._coder.encode()
        for video in frames:
            self._crew.tell("piece", self._use, video=video)
            yield self._coder.piece(video)

    def decode_chunks(self, z: Tensor, latents_per_chunk: int = 1) -> Iterator[Tensor]:
        self._crew.tell("decode", self._use, latents_per_chunk, z=z)
        self._coder.decode(latents_per_chunk, z)
        for _ in range(0, z.shape[2], latents_per_chunk):
            self._crew.tell("piece", self._use)
            yield self._coder.piece()


ASKED = {"dit": Asked, "vae": AskedVae, "decoder": AskedVae, "text": AskedText}


# ---------------------------------------------------------------- the other processes


def serve(crew: Crew) -> None:
    """Do what the first process orders, until it says that this is the end.  Raises Lost when it is gone."""
    kind, name, texts, layout, cut, vae_parallel, options = crew.hear().words
    device = crew.compute_on(kind)
    files = _files(texts)
    parts = Together(
        survey(VARIANTS[name], files), files, crew=crew, layout=Layout(**layout), cut=cut, vae_parallel=vae_parallel,
        device=device, **options,
    )  # fmt: skip
    server = _Server(parts)
    while server.answer():
        pass


class _Server:
    """Answers orders, one after the other."""

    def __init__(self, parts: Together) -> None:
        self.parts = parts
        self._open: dict[int, tuple[AbstractContextManager[Any], Any]] = {}  # number of a use -> what is held, its own
        self._orders: dict[str, Callable[..., None]] = {
            "wear": self._wear, "use": self._use, "leave": self._leave, "keep": self._keep, "release": self._release
        }  # fmt: skip

    def answer(self) -> bool:
        """Wait for an order and follow it; False when it was the last."""
        order = self.parts.crew.hear()
        failpoint("order")
        failpoint(f"order {order.what}")
        if order.what == "end":
            return False
        if order.what in CALLS:
            use, *words = order.words
            getattr(self._open[use][1], order.what)(*words, **order.tensors)
        else:
            self._orders[order.what](*order.words)
        return True

    def _wear(self, lora: str | None) -> None:
        self.parts.wear(None if lora is None else Path(lora))

    def _keep(self, staying: list[str], resident_blocks: int | None, text_streamed: bool) -> None:
        self.parts.keep(frozenset(staying), resident_blocks, text_streamed=text_streamed)

    def _release(self) -> None:
        self.parts.release()

    def _use(self, number: int, part: str, expert: str | None) -> None:
        held = self.parts.hold(part, expert)
        self._open[number] = held, held.__enter__()

    def _leave(self, number: int) -> None:
        held, _ = self._open.pop(number)
        held.__exit__(None, None, None)


def _texts(files: Files) -> dict[str, Any]:
    """Paths as texts that mean the same to another process."""
    texts: dict[str, Any] = {"experts": {name: str(path.absolute()) for name, path in files.experts.items()}}
    for entry in fields(Files):
        path = getattr(files, entry.name)
        if isinstance(path, Path):
            texts[entry.name] = str(path.absolute())
    return texts


def _files(texts: Mapping[str, Any]) -> Files:
    paths = {name: Path(text) for name, text in texts.items() if name != "experts"}
    return Files(experts={name: Path(text) for name, text in texts["experts"].items()}, **paths)
