"""Parts that variants add to the transformer: put into its hook lists from outside, one file for each kind.

    dit = build_dit(config)          # a DiT with the parts that its config names

A part lives in the block it belongs to, so that it is sharded, streamed and compiled with it; `publish` lets the
transformer's `state_dict` call it by the name it has in the published files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanloom.models.config import DiTConfig
from wanloom.models.dit import DiT


def build_dit(config: DiTConfig) -> DiT:
    """The transformer of a config, with the parts of its adapters."""
    from wanloom.models.adapters.animate import add_animate
    from wanloom.models.adapters.speech import add_speech

    dit = DiT(config)
    if config.animate is not None:
        add_animate(dit, config.animate)
    if config.speech is not None:
        add_speech(dit, config.speech)
    return dit


def publish(dit: DiT, names: Mapping[str, str]) -> None:
    """Let `state_dict` and `load_state_dict` say other names: beginnings of ours -> beginnings of the published ones.

    A published beginning of "" leaves out ours.
    """
    ours = sorted(names, key=len, reverse=True)

    def save(module: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for key in list(state):
            own = key.removeprefix(prefix)
            begin = next((begin for begin in ours if own.startswith(begin)), None)
            if begin is not None:
                state[prefix + names[begin] + own.removeprefix(begin)] = state.pop(key)

    def load(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {}
        for key in (name for name, _ in (*dit.named_parameters(), *dit.named_buffers())):
            begin = next((begin for begin in ours if key.startswith(begin)), None)
            if begin is not None:
                own[prefix + names[begin] + key.removeprefix(begin)] = prefix + key
        for published, key in own.items():
            if published in state:
                state[key] = state.pop(published)

    dit.register_state_dict_post_hook(save)  # type: ignore[no-untyped-call]  # torch's own
    dit.register_load_state_dict_pre_hook(load)  # type: ignore[no-untyped-call]  # torch's own
