"""JSON files that come with a model, read strictly: what they may hold is listed, the rest is refused or named.

A model directory is data.  Keys that make other loaders import code are refused (E4022); a duplicate key, a number that
is not finite, nesting deeper than 32 or a value of the wrong type is an error that names the key (E4021); a key we do
not know is a warning, once.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanloom.errors import InputError, WanloomWarning

MAX_DEPTH = 32
MAX_BYTES = 32 * 2**20
REFUSED = frozenset({"auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines"})

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def read_json(path: Path, *, code: str = "E4021", limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file; `code` is the error of a file that is not strict JSON.  Errors also: E4001, E4022."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(code, f"{path}: {size} bytes, expected at most {limit}.")
        raw = path.read_bytes()
    except OSError as error:
        raise InputError("E4001", f"{path}: cannot be read ({error.strerror}).") from error
    return parse_json(raw, path, code=code)


def parse_json(raw: bytes, path: Path, *, code: str = "E4021") -> Any:
    """The value of a JSON text that came from the file `path`.  Errors: `code`, E4022."""
    if _depth(raw) > MAX_DEPTH:
        raise InputError(code, f"{path}: nested deeper than {MAX_DEPTH}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise InputError(code, f"{path}: {_shown(key)}: the key stands twice.")
            if key in REFUSED:
                raise InputError("E4022", f"{path}: refused key {key}: model files never load code.")
            table[key] = value
        return table

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise InputError(code, f"{path}: {text[:40]} is not a finite number.")
        return value

    def constant(text: str) -> None:
        raise InputError(code, f"{path}: {text} is not a finite number.")

    try:
        return json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=unique, parse_float=number, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(code, f"{path}: not valid JSON{where}.") from error


def _depth(raw: bytes) -> int:
    """How deep the brackets outside of strings go."""
    depth = deepest = 0
    for byte in re.findall(rb"[\[\]{}]", _STRINGS.sub(b"", raw)):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            break
    return deepest


def check_keys(path: Path, values: object, schema: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The object in a config file with its known keys checked: name -> value.

    A key that is not in the schema is named in a warning and left out.  Errors: E4021 naming the key.
    """
    if not isinstance(values, dict):
        raise InputError("E4021", f"{path}: expected a JSON object.")
    known = {}
    for key, value in values.items():
        if key not in schema:
            warnings.warn(
                WanloomWarning(f"warning[W4021]: {path.name}: {_shown(key)}: unknown key, ignored."), stacklevel=3
            )
            continue
        if not _fits(value, schema[key]):
            names = " or ".join(_NAMES.get(kind, kind.__name__) for kind in schema[key])
            raise InputError("E4021", f"{path}: {_shown(key)}: got {json.dumps(value)[:60]}, expected {names}.")
        known[key] = value
    return known


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list",
          dict: "an object", type(None): "null"}  # fmt: skip


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a JSON value has one of these types: true is no number, and a whole number is a number."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def _shown(key: str) -> str:
    return key[:80] if key.isprintable() else ascii(key)[1:80]
