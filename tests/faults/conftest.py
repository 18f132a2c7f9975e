"""One process that has imported torch, for all tests that kill processes."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    if "resume_jobs" not in sys.modules:
        spec = importlib.util.spec_from_file_location("resume_jobs", Path(__file__).with_name("resume_jobs.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules["resume_jobs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["resume_jobs"])
    server = sys.modules["resume_jobs"].Forks()
    yield server
    server.close()
