"""Training: `wanloom train RECIPE.toml`.

recipe.py says what a run is, loop.py runs it, learner.py holds the parameters, state.py keeps it safe; data.py and
objective.py are what is learned, vae.py and flow.py the two tasks that exist, export.py writes the checkpoint.
"""

from __future__ import annotations

from pathlib import Path


def run(recipe: str | Path, root: str | Path = "runs") -> Path:
    """Train what the recipe says, or go on where the run stopped; the folder of the run.

    Errors: E4001, E4032 for the recipe, E2020 where the folder holds another recipe's state.
    """
    from wanloom.train.loop import run

    return run(recipe, root)
