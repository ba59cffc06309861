"""The standard set says things that `benchmark.py` understands, about models that can be made."""

import pytest

from benchmark import cli
from benchmark.peers.models import SHAPES
from benchmark.standard import SETS, Load

LOADS = [load for loads in SETS.values() for load in loads]


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.model)
def test_the_flags_are_known_and_no_prompt_is_sent_twice(load: Load):
    assert load.model in {"demo", *SHAPES}
    options = [cli.parser().parse_args(flags.split()) for flags in (load.closed, load.opened) if flags]
    assert options[0].concurrency_list
    assert len({each.seed for each in options}) == len(options)
    assert all(each.rps_list for each in options[1:])
