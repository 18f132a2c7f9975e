"""One process that has imported torch, for all tests that kill processes."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

JOBS = "resume_jobs"  # by this name the tests, and spawned workers, import what stands beside them


def _load_jobs() -> None:
    spec = importlib.util.spec_from_file_location(JOBS, Path(__file__).with_name(f"{JOBS}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[JOBS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[JOBS])


if JOBS not in sys.modules:
    _load_jobs()


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    server = sys.modules[JOBS].Forks()
    yield server
    server.close()
