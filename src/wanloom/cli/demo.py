"""placeholder"""

import click
from wanloom.cli.options import Command, request_options


@click.command("demo", cls=Command)
@request_options()
def command(**params: object) -> int:
    """Make a video."""
    return 0
