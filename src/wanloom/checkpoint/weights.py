"""One model's weights, wherever they lie: a single file or shards, in anybody's names, quantised or not.

`open_weights(path)` reads headers only and answers with a table under the official names: for each tensor its shape and
the places of the bytes it is made of.  What does not belong there, or is missing, is an error that names the file.
No torch here.  Errors (InputError, exit 4): those of `header.py` and `pickled.py`, and E4009 a number format that
cannot be dequantised, E4013 shards or tensors missing, twice or too many, E4014 a bad index, E4015 shards of two
revisions, E4016 a file that is no Wan model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from wanloom.checkpoint.documents import read_json
from wanloom.checkpoint.header import PICKLES, Entry, Header, read_header, stamp
from wanloom.checkpoint.names import INPUT_SCALES, OPERATIONS, SCALES, Format, format_of
from wanloom.checkpoint.pickled import read_pickled
from wanloom.errors import InputError

INDEX = ".safetensors.index.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # what the hub's libraries call a model's only file
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors", re.ASCII)
# VAE and encoders were published as pickles and are read; a transformer never is.
PUBLISHED_PICKLES: dict[str | None, tuple[str, ...]] = {
    **dict.fromkeys((None, "vae", "text", "clip"), (".pth",)), "audio": (".pth", ".bin"),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# What `convert` writes into the `__metadata__` of its files.
EXPERT = "wanloom.expert"
REVISION = "wanloom.revision"
CONFIG = "wanloom.config"  # JSON of what tensor shapes do not tell: heads, text length

KINDS = {
    "dit": "transformer", "vae": "VAE", "text": "text encoder", "clip": "CLIP image encoder",
    "audio": "wav2vec2 audio encoder",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where the values of one official tensor come from: the parts an operation joins, each with its scale or None."""

    shape: tuple[int, ...]
    entries: tuple[Entry, ...]
    scales: tuple[Entry | None, ...]
    operation: str = "same"

    @property
    def dtype(self) -> str:
        return self.entries[0].dtype

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The checked table of one model: official name -> Source."""

    path: Path
    format: Format
    headers: tuple[Header, ...]
    tensors: Mapping[str, Source]
    ignored: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.format.kind

    @property
    def where(self) -> Path:
        """What an error names: the file, or the directory of several shards."""
        return self.headers[0].path if len(self.headers) == 1 else self.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape for name, source in self.tensors.items()}

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(header.stamp.size for header in self.headers)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the files say about themselves, together."""
        return {key: value for header in self.headers for key, value in header.metadata.items()}

    @property
    def dtypes(self) -> dict[str, int]:
        """Number format -> how many values have it, the most frequent first."""
        counts: dict[str, int] = {}
        for source in self.tensors.values():
            counts[source.dtype] = counts.get(source.dtype, 0) + prod(source.shape)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def scaled(self) -> bool:
        return any(scale is not None for source in self.tensors.values() for scale in source.scales)

    @property
    def config_file(self) -> Path | None:
        """The config.json that belongs to these files, when there is one."""
        folder = self.path if self.path.is_dir() else self.path.parent
        if not self.path.is_dir() and not plain_name(self.path.name):
            return None  # the config beside a file with a name of its own may be another model's
        file = folder / "config.json"
        return file if file.is_file() else None


def plain_name(name: str) -> bool:
    """Whether a file has the name the hub's libraries give the only model of a directory."""
    stem = name.removesuffix(INDEX).removesuffix(".safetensors").removesuffix(".bin")
    return name != stem and re.sub(r"-\d{5}-of-\d{5}$", "", stem) in STEMS


def open_weights(path: Path, *, kind: str | None = None, pickles: bool = False) -> Weights:
    """The weights at `path`: a `.safetensors`, `.pth` or `.gguf` file, an index, or a directory with one model in it.

    `kind` (dit, vae, text, clip, audio) refuses other models by name; `pickles` admits those that only `convert` reads.
    Errors: see the module.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        from wanloom.checkpoint.gguf import open_gguf

        return open_gguf(path, kind=kind)
    files, where = list_files(path, kind=kind, pickles=pickles)
    headers = tuple(read_any(file) for file in files)
    _one_revision(headers)
    place = files[0] if len(files) == 1 else path  # what an error names
    entries = _merge(headers, where, place)
    found = format_of(entries)
    if found is None:
        raise InputError("E4016", f"{place}: not a Wan model ({_sample(entries)}).")
    format_, prefix = found
    if kind is not None and format_.kind != kind:
        code = {"vae": "E4017", "text": "E4020"}.get(kind, "E4016")
        raise InputError(code, f"{place}: this is a {KINDS[format_.kind]}, expected a {KINDS[kind]}.")
    if prefix:
        entries = {name.removeprefix(prefix): entry for name, entry in entries.items() if _ours(name, prefix, format_)}
    tensors, ignored = _translate(place, format_, entries)
    return Weights(path=path, format=format_, headers=headers, tensors=tensors, ignored=ignored)


def read_any(file: Path) -> Header:
    """The header of a weight file of either container."""
    return read_pickled(file) if file.suffix.lower() in PICKLES else read_header(file)


def _ours(name: str, prefix: str, format_: Format) -> bool:
    """Whether a tensor belongs to the model behind the prefix (a merged file may have other models beside it)."""
    return (
        name.startswith(prefix) or format_.ignores(name) or (format_.official(name) is not None and bool(format_.rules))
    )


# ---------------------------------------------------------------- which files


def list_files(
    path: Path, *, kind: str | None = None, pickles: bool = False
) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files of the model at `path`, and the index's map tensor -> file name where there is an index.

    A directory may hold an index with its shards, shards without an index, or one file.  Errors: E4001, E4002 (a
    pickled transformer), E4013, E4014.
    """
    if path.name.endswith(INDEX):
        return _from_index(path)
    if not path.is_dir():
        file = prefer_safetensors(path)
        stamp(file)
        if (
            file.suffix.lower() in PICKLES
            and file.suffix.lower() not in PUBLISHED_PICKLES.get(kind, ())
            and not pickles
        ):
            raise InputError(
                "E4002",
                f"{file}: pickle format refused, it can hold code. Run: wanloom convert {file} DIR --to official",
            )
        return [file], None
    indexes = sorted(path.glob("*" + INDEX))
    indexes = [i for i in indexes if i.name.removesuffix(INDEX) in STEMS] or indexes
    if len(indexes) > 1:
        raise InputError("E4013", f"{path}: several models ({few(i.name for i in indexes)}). Name the file you mean.")
    if indexes:
        return _from_index(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    shards = [file for file in files if SHARD.fullmatch(file.name)]
    if shards:
        return _all_shards(path, shards), None
    named = [file for file in files if file.stem in STEMS]
    if len(named or files) == 1:
        return (named or files), None
    if files:
        raise InputError("E4013", f"{path}: several models ({few(f.name for f in files)}). Name the file you mean.")
    pickled = sorted(file for file in path.iterdir() if file.suffix.lower() in PICKLES)
    pickled = [file for file in pickled if file.stem in STEMS] or pickled
    if len(pickled) == 1:
        return list_files(pickled[0], kind=kind, pickles=pickles)
    if pickled:
        raise InputError("E4002", f"{pickled[0]}: pickle format refused. Run: wanloom convert {path} DIR --to official")
    raise InputError("E4001", f"{path}: no weight files in this directory.")


def prefer_safetensors(file: Path) -> Path:
    """The `.safetensors` of the same stem where there is one, else the file itself."""
    other = file.with_suffix(".safetensors")
    return other if file.suffix.lower() in PICKLES and other.is_file() else file


def _from_index(index: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The shards an index names, all there and no others."""
    table = read_json(index, code="E4014")
    where = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise InputError("E4014", f"{index}: no weight_map of tensor to file name.")
    folder = index.parent
    names = sorted(set(where.values()))
    for name in names:
        if not re.fullmatch(r"[\w][\w.\-]{0,200}\.safetensors", name, re.ASCII) or ".." in name:
            raise InputError("E4014", f"{index}: {ascii(name)[:80]} is not the name of a file in this directory.")
        if not _inside(folder / name, folder):
            raise InputError("E4014", f"{index}: {name} is a link that leads out of the directory.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError("E4013", f"{folder}: {len(missing)} of {len(names)} shards missing: {few(missing)}.")
    stem = index.name.removesuffix(INDEX)
    extra = [
        file.name
        for file in sorted(folder.glob("*.safetensors"))
        if file.name not in names and (file.stem == stem or _stem(file.name) == stem)
    ]
    if extra:
        raise InputError("E4013", f"{folder}: shards that {index.name} does not list: {few(extra)}.")
    return [folder / name for name in names], where


def _stem(name: str) -> str | None:
    match = SHARD.fullmatch(name)
    return match["stem"] if match else None


def _inside(file: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in its folder, or in the blobs of the hub cache the folder is part of."""
    target = file.resolve()
    home = folder.resolve()
    if target.is_relative_to(home):
        return True
    # The hub's cache: models--x--y/snapshots/<revision>/... are links to models--x--y/blobs/<hash>.
    return any(parent.name == "snapshots" and target.parent == parent.parent / "blobs" for parent in home.parents)


def _all_shards(folder: Path, shards: Sequence[Path]) -> list[Path]:
    """Shards without an index: the names themselves say how many there must be."""
    matches = [SHARD.fullmatch(file.name) for file in shards]
    sets = {(match["stem"], int(match["count"])) for match in matches if match}
    if len(sets) > 1:
        raise InputError("E4013", f"{folder}: shards of several models: {few(file.name for file in shards)}.")
    stem, count = sets.pop()
    present = {int(match["number"]) for match in matches if match}
    missing = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, min(count, 1000) + 1) if i not in present]
    if missing:
        raise InputError("E4013", f"{folder}: {len(missing)} of {count} shards missing: {few(missing)}.")
    return list(shards)


# ---------------------------------------------------------------- which tensors


def _one_revision(headers: Sequence[Header]) -> None:
    """E4015 when shards carry the marks of different conversions or trainings."""
    marked = {header.metadata.get(REVISION): header.path.name for header in headers}
    if len(marked) > 1:
        names = " and ".join(sorted(marked.values())[:2])
        raise InputError("E4015", f"{headers[0].path.parent}: shards of two revisions ({names}). Fetch all of one.")


def _merge(headers: Sequence[Header], where: Mapping[str, str] | None, path: Path) -> dict[str, Entry]:
    """All tensors of all shards, each once, as the index says."""
    entries: dict[str, Entry] = {}
    for header in headers:
        for name, entry in header.entries.items():
            if name in entries:
                raise InputError(
                    "E4013", f"{header.path}: tensor {name} is also in {entries[name].file.name}: shards overlap."
                )
            if where is not None and where.get(name) != header.path.name:
                said = f"puts in {where[name]}" if name in where else "does not list"
                raise InputError("E4013", f"{header.path}: tensor {name}, which the index {said}.")
            entries[name] = entry
    missing = [name for name in where or () if name not in entries]
    if missing:
        place = headers[0].path.parent / where[missing[0]] if where else path
        raise InputError("E4013", f"{place}: {len(missing)} tensors of the index are not there: {few(missing)}.")
    return entries


def _translate(path: Path, format_: Format, entries: Mapping[str, Entry]) -> tuple[dict[str, Source], tuple[str, ...]]:
    """Foreign entries -> official sources, and the names that were left out on purpose."""
    scales = _find_scales(path, entries)
    beside = set(scales.values())
    ignored = [name for name in entries if format_.ignores(name)]
    aliases = {second: first for first, second in format_.aliases if second in entries}
    parts: dict[str, dict[int, Entry]] = {}
    operations: dict[str, str] = {}
    strangers = []
    for name, entry in entries.items():
        if name in beside or name.endswith(INPUT_SCALES) or format_.ignores(name):
            continue
        if name in aliases:
            if aliases[name] in entries:
                ignored.append(name)
                continue
            name = aliases[name]
        found = format_.official(name)
        if found is None:
            strangers.append(name)
            continue
        official, part, operations[official] = found
        parts.setdefault(official, {})[part] = entry
    if strangers:
        raise InputError(
            "E4013", f"{path}: {len(strangers)} tensors that no {KINDS[format_.kind]} has: {few(strangers)}."
        )
    tensors = {}
    for official, by_part in parts.items():
        operation = OPERATIONS[operations[official]]
        ordered = tuple(by_part[i] for i in sorted(by_part))
        shape = operation.into_shape([entry.shape for entry in ordered]) if len(ordered) == operation.parts else None
        if shape is None:
            raise InputError("E4013", f"{path}: {ordered[0].name}: its companions are missing or of another shape.")
        found_scales = tuple(_scale_of(entry, scales, entries) for entry in ordered)
        for entry, scale in zip(ordered, found_scales, strict=True):
            _check_numbers(entry, scale)
        tensors[official] = Source(shape, ordered, found_scales, operations[official])
    return tensors, tuple(ignored)


def _find_scales(path: Path, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Name of a quantised weight -> name of its scale.  Formats with scales of scales (4 bits) are refused."""
    found: dict[str, str] = {}
    for name in entries:
        if name.endswith(".weight_scale_2"):
            raise InputError(
                "E4009", f"{path}: tensor {name}: 4-bit weights are not read. Use fp8, fp16 or bf16 files."
            )
        suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), None)
        weight = name.removesuffix(suffix) + ".weight" if suffix else ""
        if weight in entries:
            found[weight] = name
    return found


def _scale_of(entry: Entry, scales: Mapping[str, str], entries: Mapping[str, Entry]) -> Entry | None:
    return entries[scales[entry.name]] if entry.name in scales else None


def _check_numbers(entry: Entry, scale: Entry | None) -> None:
    """E4009 unless the values can be turned into the floating-point numbers they stand for."""
    if entry.dtype == "I8" and scale is None:
        raise InputError("E4009", f"{entry.file}: tensor {entry.name}: int8 without a scale.")
    if entry.dtype not in FLOATS and entry.dtype != "I8":
        raise InputError("E4009", f"{entry.file}: tensor {entry.name}: {entry.dtype} values are not weights.")
    if scale is not None:
        rows = entry.shape[0] if entry.shape else 1
        if scale.dtype not in FLOATS or scale.shape not in ((), (1,), (rows,), (rows, 1), (1, 1)):
            raise InputError(
                "E4009",
                f"{scale.file}: tensor {scale.name}: {scale.dtype} {list(scale.shape)} is no scale of this weight.",
            )


def few(names: Iterable[str], most: int = 10) -> str:
    """The first names of many, for a message."""
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if name.isprintable() else ascii(name)[1:-1] for name in names[:most]) + more


def _sample(entries: Mapping[str, Entry]) -> str:
    names = sorted(entries)
    return f"{len(names)} tensors, the first is {ascii(names[0])[1:-1][:80]}" if names else "no tensors"
