"""Videos from prompts and pictures with the Wan family of open models.

    import wanloom

    pipe = wanloom.load()                              # the small model that ships inside; or a checkpoint directory
    video = pipe(prompt="a red circle moves left on sand", seed=1)
    video.save("a.mp4")

Importing this loads nothing heavy: each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanloom.errors import InputError
    from wanloom.pipeline import Pipeline, load
    from wanloom.request import Request
    from wanloom.results import Event, Result, Video
    from wanloom.variants import VARIANTS

    __version__: str

_HOME = {
    "load": "pipeline",
    "Pipeline": "pipeline",
    "Event": "results",
    "Result": "results",
    "Video": "results",
    "Request": "request",
    "VARIANTS": "variants",
    "InputError": "errors",
}

__all__ = ["VARIANTS", "Event", "InputError", "Pipeline", "Request", "Result", "Video", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"wanloom.{_HOME[name]}"), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("wanloom")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+source"
    raise AttributeError(f"module 'wanloom' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
