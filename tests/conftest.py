"""What all tests share: one thread, one seed, no windows, and Hypothesis profiles."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
# One thread: sums have one order, and tests that run side by side do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Neural networks make examples slow and their times uneven, so there is no deadline.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same global seed, whatever ran before it."
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    "Nobody cuts the power during a test; those that ask for it see to it themselves."
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def generator():
    "A seeded generator, for functions that ask for one."
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    "The longest test begins first, so that no process is left alone with it at the end."
    items.sort(key=lambda item: item.name != "test_documentation")
