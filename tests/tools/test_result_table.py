"""The table of the long tests: what is in it."""

from __future__ import annotations

from types import SimpleNamespace

from result_table import revision, table


def report(nodeid: str, duration: float) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, duration=duration)


def test_cases_of_a_function_are_a_row() -> None:
    stats = {
        "passed": [report("tests/b.py::test_two[1]", 1.2), report("tests/b.py::test_two[2]", 2.2)],
        "failed": [report("tests/b.py::test_two[3]", 0.1)],
        "error": [report("tests/a.py::test_one", 0.0)],
        "skipped": [report("tests/a.py::test_none", 0.0)],
        "warnings": [report("tests/a.py::test_other", 9.0)],
    }
    page = table(stats, "faults")
    assert page.startswith("# `make faults`\n\n2 passed, 2 failed, 1 skipped; 20")
    assert revision() in page
    rows = [line for line in page.splitlines() if "::" in line]
    assert rows == [
        "| a.py::test_none | 0 | 0 | 1 | 0 |",
        "| a.py::test_one | 0 | 1 | 0 | 0 |",
        "| b.py::test_two | 2 | 1 | 0 | 4 |",
    ]
