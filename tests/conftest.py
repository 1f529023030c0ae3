"""Shared by all tests: one thread (two are slower on a busy machine), and the optional folder of real data."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(os.environ.get("DETECTOR_SHARED", Path(__file__).resolve().parents[2] / "shared"))

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="PAGE", help="write what tests/test_matrix.py finds, such as docs/matrix.md")


def pytest_collection_finish() -> None:
    """What the imports have made, half a million objects, stays: no collection need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets, golden fixtures and weights, where they are at hand."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared folder with real data at {SHARED}")
    return SHARED


class Golden:
    """One file of inputs and outputs of the peers' own code: `golden("atss").scenario("typical")["gt"]`."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as data:
            self.arrays = {k: np.ascontiguousarray(data[k]) for k in data.files}

    def scenarios(self) -> list[str]:
        return sorted({k.split("/")[0] for k in self.arrays})

    def scenario(self, name: str) -> dict[str, torch.Tensor]:
        start = name + "/"
        return {k[len(start) :]: torch.from_numpy(v) for k, v in self.arrays.items() if k.startswith(start)}


@pytest.fixture(scope="session")
def golden(shared: Path):  # type: ignore[no-untyped-def]
    """Loads a golden fixture by name; the test is skipped where there is none."""

    def load(name: str) -> Golden:
        return Golden(shared / "golden" / f"{name}.npz")

    return load
