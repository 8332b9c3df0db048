"""What the tests of killed runs share."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import pytest


@pytest.fixture(scope="session")
def zygote() -> Iterator[cases.Zygote]:
    """Runs a command line in a child: the exit status, negative for a signal."""
    with cases.zygote() as run:
        yield run
