"""A stage is finished only when it holds what was asked."""

from types import SimpleNamespace

import pytest
from small import small_job

from raysae.errors import Fault
from raysae.placement import Placement
from raysae.stages import Stages, refuse_partial


def test_what_is_not_there_is_named():
    refuse_partial("SAEs", ["a", "b"], {"a": 1, "b": 2, "c": 3})
    with pytest.raises(Fault, match=r"^SAEs: 2 of 3 are not there, such as b; the same command goes on from here$"):
        refuse_partial("SAEs", ["a", "b", "c"], {"a": 1})


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_pool_that_ends_early_finishes_no_stage(tmp_path, monkeypatch, done):
    stages = Stages(small_job(tmp_path, tmp_path))
    stages._cluster = SimpleNamespace(capture=lambda blocks: Placement(1, 1.0, 0.0, 1))
    blocks = [{"name": "train-0"}, {"name": "train-1"}]

    def map_blocks(self, what, blocks, tokens, root, model, work, placement):
        for block in blocks[:done]:
            (root / block["name"]).touch()
        return 1.0

    monkeypatch.setattr(Stages, "_map_blocks", map_blocks)
    works = {"measure": SimpleNamespace(root=tmp_path)}

    def over_blocks():
        return stages._over_blocks(works, blocks, lambda root, name: (root / name).exists(), tmp_path, "m")

    if done == 2:
        assert over_blocks()["cpu_seconds"] == 1.0
    else:
        with pytest.raises(Fault, match=f"measure: {2 - done} of 2 are not there, such as train-{done}"):
            over_blocks()
