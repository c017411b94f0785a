"""Thread scaling, from times that are known."""

import pytest
import torch

from benchmarks.kernels import threads
from benchmarks.kernels.measure import measured


@pytest.mark.parametrize(("cores", "wanted"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_of_threads(cores, wanted):
    assert threads.counts(cores) == wanted


def test_each_time_is_taken_with_its_number_of_threads():
    before = torch.get_num_threads()
    found = threads.by_threads(3, lambda: (6.0 / torch.get_num_threads(), 4.0))
    assert torch.get_num_threads() == before
    assert (found["threads"], found["time_s"], found["products_s"]) == ([1, 2, 3], [6.0, 3.0, 2.0], [4.0] * 3)
    assert "| 3 | 2 | 3.00 | 4 | 1.00 |" in threads.markdown(found)


def test_the_real_thing(monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.measure.usable_cores", lambda: 2)
    found = measured("threads", "32x16x100x8", threads.CONTENDER, "cpu", 1)
    assert found["threads"] == [1, 2]
    assert min(*found["time_s"], *found["products_s"]) > 0


def test_what_was_not_measured_says_why():
    assert threads.markdown({"not_run": "out of memory"}) == "Thread scaling was not measured: out of memory"
