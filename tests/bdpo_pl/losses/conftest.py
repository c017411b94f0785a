"""A fixture of the tests of losses: numbers that are drawn are the same in every run."""

import pytest
import torch


@pytest.fixture
def seeded():
    torch.manual_seed(0)
