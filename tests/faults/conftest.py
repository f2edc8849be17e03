"""What all faults befall: a small job, its model, and the parts that it makes undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.artifacts import digits_artifact
from support.children import Children, children
from support.scoring import DONE, files, small_job

import tfb
from tfb.adapters.loading import load_tokenizer
from tfb.demo import digits
from tfb.scoring.job import Job
from tfb.scoring.run import run


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(digits_artifact(tmp_path_factory.mktemp("made")))


@pytest.fixture(scope="session")
def loaded(artifact: str) -> tuple[tfb.BayesianModel, Any]:
    return tfb.load(str(digits.BASE), artifact), load_tokenizer(str(digits.BASE))


@pytest.fixture
def job(
    artifact: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A job on 21 digits in parts of 6, with a model that is loaded once for all tests."""
    monkeypatch.setattr(Job, "load", lambda _: loaded)
    return small_job(artifact, tmp_path)


@pytest.fixture(scope="session")
def whole(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of an uninterrupted run of ``job``, from a model of its own."""
    job = small_job(artifact, tmp_path_factory.mktemp("whole"))
    assert run(job) == DONE
    return files(job)


@pytest.fixture(scope="session")
def in_child() -> Iterator[Children]:
    """Calls functions in processes of their own."""
    with children() as found:
        yield found
