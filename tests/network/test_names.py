"""Names that wrappers put something before."""

import pytest

from swap_prune.network.names import renamed

PLAIN = ["a.weight", "module.weight"]  # a network may have a module of that name


@pytest.mark.parametrize("there", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("here", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapper_is_taken_off_or_put_on(there, here):
    held = {there + name: number for number, name in enumerate(PLAIN)}
    assert renamed(held, [here + name for name in PLAIN]) == {here + name: i for i, name in enumerate(PLAIN)}


def test_other_names_stay():
    assert renamed({"a": 1, "b": 2}, ["b", "c"]) == {"a": 1, "b": 2}
    assert renamed({"a": 1}, ["c"]) == {"a": 1}
    assert renamed({"module.a": 1, "b": 2}, ["a", "b"]) == {"module.a": 1, "b": 2}, "not before all names"
    assert renamed({}, ["module.a"]) == {} and renamed({"module.a": 1}, []) == {"a": 1}
