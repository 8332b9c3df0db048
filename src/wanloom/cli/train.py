"""`wanloom train RECIPE.toml`: hand a recipe to the trainer."""

from __future__ import annotations

from pathlib import Path

import click

from wanloom.cli.console import say
from wanloom.cli.options import Command
from wanloom.errors import InputError


@click.command("train", cls=Command)
@click.argument("recipe", type=str, metavar="RECIPE.toml")
def command(recipe: str) -> None:
    """Train a model from a recipe file. Started again with the same recipe, it continues where it stopped."""
    if not Path(recipe).is_file():
        raise InputError("E4001", f"recipe: '{recipe}' is not a file. Recipes of the demo models lie in recipes/.")
    from wanloom import train

    say(f"The run is in {train.run(recipe)}.")
