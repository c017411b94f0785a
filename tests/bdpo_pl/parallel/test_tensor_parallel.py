"""Models of which each rank has a part, by transformers' own plan of how their layers are cut."""

import pytest
import tensor_parallel_ranks
from architectures import ARCHITECTURES as TWINS
from architectures import tiny
from ranks import run_ranks

from bdpo_pl.errors import InputError
from bdpo_pl.parallel.tensor_parallel import ARCHITECTURES, check_tensor_parallel


def test_parts_equal_the_whole(tmp_path):
    names = [name for name, (model_type, _) in TWINS.items() if model_type in ARCHITECTURES]
    assert {TWINS[name][0] for name in names} == set(ARCHITECTURES)
    run_ranks(tensor_parallel_ranks.parts_equal_the_whole, tmp_path, names)


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Gemma 3 (text)", "OLMo 3"])
def test_what_cannot_be_cut_so_is_refused(name):
    with pytest.raises(InputError, match="can be split this way; set it to 1"):
        check_tensor_parallel(tiny(name).config, 2, name)
