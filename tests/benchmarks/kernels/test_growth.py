"""Slopes of cost over size, from costs whose growth is known."""

import pytest

from benchmarks.kernels.growth import AXES, markdown, measure_growth, slope
from benchmarks.kernels.problem import find_shape


def test_slopes_of_powers():
    sizes = [1, 2, 4, 8]
    assert slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert slope(sizes, [7.0] * 4) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="positive"):
        slope(sizes, [1.0, 0.0, 1.0, 1.0])


def test_each_axis_changes_one_size():
    for axis, changed in (("tokens", "N"), ("vocabulary", "V"), ("pairs", "T")):
        shapes = {size: find_shape(name) for size, name in AXES[axis].items()}
        for field in ("N", "D", "V", "T"):
            assert (len({getattr(shape, field) for shape in shapes.values()}) == 1) == (field != changed)
    for pairs, name in AXES["pairs"].items():
        shape = find_shape(name)
        assert pairs == shape.N // (2 * shape.T)


def test_growth_of_a_cost_that_is_known():
    def point(shape):
        return {"forward_backward_s": [2e-9 * shape.N * shape.V, 1e-9 * shape.N * shape.V], "extra_bytes": 1 << 26}

    def run(names):
        return {"points": [point(find_shape(name)) for name in names]}

    tokens, vocabulary, pairs = measure_growth(run)
    assert tokens["time_slope"] == pytest.approx(1.0)
    assert vocabulary["time_slope"] == pytest.approx(1.0)
    assert pairs["time_slope"] == pytest.approx(0.0)
    assert [one["memory_slope"] for one in (tokens, vocabulary, pairs)] == pytest.approx([0.0] * 3)
    assert tokens["time_s"][0] == pytest.approx(1e-9 * 512 * 16_000)


def test_table_marks_what_misses_the_goal_and_says_what_was_not_run():
    done = {"axis": "tokens", "sizes": [512, 1024], "time_slope": 1.2, "memory_slope": 0.4}
    table = markdown([done, {"axis": "pairs", "not_run": "out of memory"}])
    assert "| tokens | 512, 1,024 | 1.20 > goal | 0.40 |" in table
    assert "| pairs | not run: out of memory | | |" in table
