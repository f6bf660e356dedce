"""The ledger of looks at a test split: one per question asked of it, across the runs of an output."""

import json

import pytest

from raysae.errors import Damaged
from raysae.looks import look


def test_a_look_is_counted_once_and_later_ones_know_of_it(tmp_path):
    first = look(tmp_path, "records-a", "choice", "one", {"run": {"seed": 0}, "saes": ["x"]})
    assert first == {"test_split": "records-a", "number": 1, "earlier": []}
    other = look(tmp_path, "records-a", "probes", "two", {"run": {"seed": 0}, "saes": ["x"]})
    assert other["number"] == 2 and [(e["by"], e["run"]) for e in other["earlier"]] == [("choice", "one")]
    before = (tmp_path / "looks" / "records-a.json").stat().st_mtime_ns
    assert look(tmp_path, "records-a", "choice", "one", {"run": {"seed": 0}, "saes": ["x"]}) == first, "the same look"
    assert (tmp_path / "looks" / "records-a.json").stat().st_mtime_ns == before
    assert look(tmp_path, "records-a", "choice", "one", {"run": {"seed": 0}, "saes": ["y"]})["number"] == 3
    assert look(tmp_path, "records-b", "choice", "one", {"run": {"seed": 0}, "saes": ["z"]})["number"] == 1
    assert len(json.loads((tmp_path / "looks" / "records-a.json").read_text())) == 3
    (tmp_path / "looks" / "records-a.json").write_text("[{}]")
    with pytest.raises(Damaged, match=r"records-a\.json"):
        look(tmp_path, "records-a", "choice", "one", {})
