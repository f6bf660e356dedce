"""A stage is finished only when it holds what was asked."""

from types import SimpleNamespace

import pytest

from raysae.bench import LocalBench
from raysae.errors import Fault
from raysae.stages.work import over_blocks, refuse_partial


def test_what_is_not_there_is_named():
    refuse_partial("SAEs", ["a", "b"], {"a": 1, "b": 2, "c": 3})
    with pytest.raises(Fault, match=r"^SAEs: 2 of 3 are not there, such as b; the same command goes on from here$"):
        refuse_partial("SAEs", ["a", "b", "c"], {"a": 1})


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_pool_that_ends_early_finishes_no_stage(tmp_path, done):
    class Early(LocalBench):
        def over_blocks(self, what, blocks, tokens, model, work):
            for block in blocks[:done]:
                (work.root / block["name"]).touch()
            return 1.0

    blocks = [{"name": "train-0"}, {"name": "train-1"}]
    works = {"measure": SimpleNamespace(root=tmp_path)}

    def work():
        return over_blocks(Early(), works, blocks, lambda root, name: (root / name).exists(), tmp_path, {})

    if done == 2:
        assert work()["cpu_seconds"] > 0
    else:
        with pytest.raises(Fault, match=f"measure: {2 - done} of 2 are not there, such as train-{done}"):
            work()
