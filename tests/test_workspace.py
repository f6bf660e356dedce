"""Stages: made once, resumed, never half there; one driver at a time."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small import make as stage

from raysae import files, workspace
from raysae.artifacts import fingerprint, link_or_copy, size_of
from raysae.errors import Damaged
from raysae.files import canonical, read_json, read_sealed, sha256_of, write_atomic, write_json
from raysae.workspace import NotMade, Stage, Workspace


def test_a_finished_stage_is_not_built_again(tmp_path):
    built = []

    def build(path):
        built.append(path)
        (path / "data").write_bytes(b"12345")
        return {"rows": 5, "cost": {"tokens": 7}}

    one = stage(tmp_path, "store", {"a": 1}, build)
    two = stage(tmp_path, "store", {"a": 1}, build)
    assert len(built) == 1 and (one.reused, two.reused) == (False, True)
    assert one.path == two.path and one.path.parent == tmp_path / "stages" and one.path.name.startswith("store-")
    assert one.manifest == two.manifest == read_sealed(one.path / "manifest.json")
    assert one.manifest["inputs"] == {"version": 1, "a": 1}
    assert one.manifest["rows"] == 5 and one.manifest["stage"] == "store"
    cost = one.manifest["cost"]
    assert cost["tokens"] == 7 and cost["bytes"] == 5 and cost["seconds"] >= 0


def test_other_inputs_are_another_directory_and_order_is_not_an_input(tmp_path):
    def made(name="s", **inputs):
        return stage(tmp_path, name, inputs, lambda path: {}).path

    assert made(a=1, b={"x": 1, "y": 2}) == made(b={"y": 2, "x": 1}, a=1)
    assert len({made(a=1, b=2), made(a=2, b=2), made(a=1), made("t", a=1), made(a="1"), made(a=[1])}) == 6


def test_a_crash_leaves_no_manifest_and_the_next_run_resumes_what_is_there(tmp_path):
    def crash(path):
        (path / "part").write_text("done")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        stage(tmp_path, "s", {}, crash)
    (directory,) = (tmp_path / "stages").glob("s-*")
    assert not (directory / "manifest.json").exists()

    def resume(path):
        assert (path / "part").read_text() == "done"
        assert not (path / "manifest.json").exists(), "the manifest comes last"
        return {}

    assert stage(tmp_path, "s", {}, resume) == workspace.Made(
        directory, read_sealed(directory / "manifest.json"), False
    )


def test_a_crash_while_the_manifest_is_written_leaves_none(tmp_path, monkeypatch):
    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        stage(tmp_path, "s", {}, lambda path: {})
    monkeypatch.undo()
    assert not list((tmp_path / "stages").rglob("manifest.json"))
    assert not [p for p in (tmp_path / "stages").rglob("*.tmp")]
    assert not stage(tmp_path, "s", {}, lambda path: {}).reused


def test_a_second_driver_waits_for_the_first_and_takes_its_work(tmp_path, monkeypatch):
    started, said, found = threading.Event(), [], []
    monkeypatch.setattr(workspace, "say", said.append)

    def slow(path):
        started.set()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:  # until the other has said that it waits
            time.sleep(0.005)
        return {"by": "first"}

    def second():
        assert started.wait(10)
        found.append(stage(tmp_path, "s", {}, lambda path: {"by": "second"}))

    other = threading.Thread(target=second)
    other.start()
    first = stage(tmp_path, "s", {}, slow)
    other.join(10)
    assert first.manifest["by"] == found[0].manifest["by"] == "first" and found[0].reused
    assert len(said) == 1 and "another driver" in said[0]


def test_a_mistake_found_before_anything_was_made_leaves_nothing_and_does_not_trip_who_waits(tmp_path, monkeypatch):
    started, said, found = threading.Event(), [], []
    monkeypatch.setattr(workspace, "say", said.append)

    def mistake(path):
        started.set()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.005)
        raise ValueError("a wrong file")

    def second():
        assert started.wait(10)
        found.append(stage(tmp_path, "s", {}, lambda path: {"made": (path / "f").write_text("x")}))

    other = threading.Thread(target=second)
    other.start()
    with pytest.raises(ValueError, match="a wrong file"):
        stage(tmp_path, "s", {}, mistake)
    other.join(10)
    assert found and not found[0].reused and found[0].manifest["made"] == 1
    with pytest.raises(ZeroDivisionError):
        stage(tmp_path, "t", {}, lambda path: 1 / 0)
    assert not list((tmp_path / "stages").glob("t-*"))


def test_the_lock_is_free_after_a_crash(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError):
        stage(tmp_path, "s", {}, lambda path: (_ for _ in ()).throw(RuntimeError))
    monkeypatch.setattr(workspace, "say", pytest.fail)
    stage(tmp_path, "s", {}, lambda path: {})


def test_fingerprints_do_not_depend_on_order_process_or_container():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1}) == "626fe1ec4609"
    assert canonical({"b": 1.0, "a": None}) == '{"a":null,"b":1.0}'


def test_write_atomic_is_all_or_nothing(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")

    def half(path):
        path.write_text("ne")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomic(file, half)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]
    write_json(file, {"p": Path("y")})
    assert read_json(file) == {"p": "y"}


def test_link_or_copy_replaces_and_leaves_the_source(tmp_path):
    (tmp_path / "a/sub").mkdir(parents=True)
    (tmp_path / "a/sub/f").write_text("new")
    (tmp_path / "b/sub").mkdir(parents=True)
    (tmp_path / "b/sub/f").write_text("old")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    link_or_copy(tmp_path / "a/sub/f", tmp_path / "deep/er/f")
    assert (tmp_path / "b/sub/f").read_text() == (tmp_path / "deep/er/f").read_text() == "new"
    (tmp_path / "b/sub/f").unlink()
    assert (tmp_path / "a/sub/f").read_text() == "new"


def test_size_counts_files_once_and_no_links(tmp_path):
    (tmp_path / "f").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    assert size_of(tmp_path) == 3


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "f") == expected
    with (tmp_path / "f").open("rb") as file:
        assert files._sha256(file) == expected  # for Python 3.10


def test_a_stage_with_failed_parts_stands_for_its_run_and_is_built_again_by_the_next(tmp_path):
    fails = [["a", "b"], ["b"], []]

    def build(path):
        assert not (path / "manifest.json").exists(), "while it is built it is not finished"
        return {"failed": dict.fromkeys(fails.pop(0), "no memory")}

    made = [stage(tmp_path, "sweep", {}, build) for _ in range(4)]
    assert [s.reused for s in made] == [False, False, False, True] and not fails
    keys = [s.key for s in made]
    assert len(set(keys[:3])) == 3, "a later stage must not take over what it made of fewer parts"
    assert keys[2] == keys[3] == made[0].path.name == stage(tmp_path, "sweep", {}, build).key


def test_a_failed_part_whose_next_try_is_killed_is_tried_again(tmp_path):
    stage(tmp_path, "sweep", {}, lambda path: {"failed": {"a": "no memory"}})
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, "sweep", {}, lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not stage(tmp_path, "sweep", {}, lambda path: {"failed": {}}).reused


def two(log: list[str], facts: dict | None = None, **settings) -> tuple[Stage, Stage]:
    """A stage and one that is made from it, which write down that they are built."""

    def build(name: str):
        def work(path, inputs, bench):
            log.append(name)
            return {"read": sorted(inputs), **(facts or {})}

        return work

    one = Stage("one", 1, {"a": 1}, {}, build("one"))
    return one, Stage("two", 1, settings, {"one": one, "none": None}, build("two"))


def test_inputs_are_made_first_and_name_what_is_made_from_them(tmp_path):
    log = []
    one, other = two(log)
    place = Workspace(tmp_path, None)
    made = place.make(other)
    assert log == ["one", "two"] and made.manifest["read"] == ["one"]
    assert made.manifest["inputs"] == {"version": 1, "one": place.make(one).path.name, "none": None}
    assert list(place.made) == [place.make(one).path.name, made.path.name], "in the order in which they were made"
    assert log == ["one", "two"]


def test_what_is_looked_for_is_not_made(tmp_path):
    log = []
    one, other = two(log)
    with pytest.raises(NotMade):
        Workspace(tmp_path, None).find(other)
    made = Workspace(tmp_path, None).make(one)
    assert log == ["one"] and [m.path for m in Workspace(tmp_path, None).find_all([other, one])] == [made.path]
    Workspace(tmp_path, None).make(other)
    assert Workspace(tmp_path, None).find(other).reused and log == ["one", "two"]


def test_an_implied_input_is_made_and_does_not_name(tmp_path):
    log = []
    _, other = two(log)
    named, implied = other, replace(other, implied=frozenset({"one"}))
    assert Workspace(tmp_path, None).make(implied).manifest["inputs"] == {"version": 1, "none": None}
    assert log == ["one", "two"]
    assert Workspace(tmp_path, None).make(named).path != Workspace(tmp_path, None).make(implied).path


def test_settings_may_come_from_what_was_made(tmp_path):
    log = []
    _, other = two(log, {"weights": "w"})
    by_weights = replace(other, settings=lambda inputs: {"weights": inputs["one"].manifest["weights"]})
    assert Workspace(tmp_path, None).make(by_weights).manifest["inputs"]["weights"] == "w"


def test_settings_that_have_no_one_spelling_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Path"):
        stage(tmp_path, "s", {"path": Path("x")}, lambda path: {})
    with pytest.raises(TypeError, match="set"):
        stage(tmp_path, "s", {"names": {"a", "b"}}, lambda path: {})


def test_what_a_new_stage_is_made_from_is_compared_with_its_hashes_first(tmp_path):
    def write(path, inputs, bench):
        (path / "below").mkdir()
        (path / "below" / "x").write_text("whole")
        return {}

    one = Stage("one", 1, {}, {}, write)
    file = Workspace(tmp_path, None).make(one).path / "below" / "x"
    file.write_text("other")  # of the same size
    assert Workspace(tmp_path, None).find(one).reused
    with pytest.raises(Damaged, match="below/x"):
        Workspace(tmp_path, None).make(Stage("two", 1, {}, {"one": one}, write))
    with pytest.raises(Damaged, match="below/x"):
        Workspace(tmp_path, None, verify=True).make(one)
