"""Files are whole or absent, on disk, readable by whoever may, and noticed when they are not what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from small import make as stage

from raysae import files
from raysae.artifacts import lock_of
from raysae.bench import LocalBench
from raysae.errors import Damaged, UserError
from raysae.files import (
    compare,
    contents,
    folder_name,
    inside,
    read_json,
    read_sealed,
    read_table,
    whole_folder,
    write_atomic,
    write_json,
    write_sealed,
)
from raysae.workspace import Stage, Workspace


@pytest.fixture(params=[0o002, 0o077], ids=["team", "private"])
def mode(request):
    """The mode of new files under a umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_follow_the_umask_whatever_library_writes_them(mode, tmp_path):
    def build(path):
        save_file({"x": torch.ones(2)}, path / "plain.safetensors")  # which makes it 0600
        write_atomic(path / "atomic.safetensors", lambda p: save_file({"x": torch.ones(2)}, p))
        with whole_folder(path / "whole") as folder:
            save_file({"x": torch.ones(2)}, folder / "x.safetensors")
        return {}

    made = stage(tmp_path, "s", {}, build).path
    written = [path for path in made.rglob("*") if path.is_file()]
    assert len(written) == 4 and {mode_of(path) for path in written} == {mode}
    with lock_of(tmp_path, "t"):
        assert mode_of(tmp_path / "stages/.locks/t") == mode


def test_a_file_is_on_disk_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    done = []

    def synced(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    real = os.replace
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("name", Path(b).name)), real(a, b)))
    write_json(tmp_path / "f.json", {})
    (_, temporary), *rest = done
    assert temporary.startswith(".f.json.") and rest == [("name", "f.json"), ("sync", tmp_path.name)]


def test_a_manifest_comes_after_the_files_it_lists_are_on_disk(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))

    def build(path):
        (path / "sub").mkdir()
        (path / "sub" / "shard").write_text("x")
        return {}

    stage(tmp_path, "s", {}, build)
    manifest = next(i for i, name in enumerate(done) if name.startswith(".manifest.json"))
    assert {"shard", "sub"} <= set(done[:manifest])


def test_json_holds_no_nan(tmp_path):
    value = {"a": float("nan"), "b": [np.float32("inf"), np.int64(3)], "c": np.array([1.0, np.nan]), "d": Path("p")}
    write_json(tmp_path / "f", value)
    text = (tmp_path / "f").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [None, 3], "c": [1.0, None], "d": "p"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renames twice")
def test_two_folders_change_places_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / name).mkdir(parents=True)
    assert files._exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").is_dir() and (tmp_path / "other" / "one").is_dir()


@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_a_folder_is_replaced_as_one_whole(tmp_path, monkeypatch, how):
    if how == "rename":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    folder = tmp_path / "run"

    def make(value):
        with whole_folder(folder) as made:
            (made / "a").write_text(value)
            (made / "b").write_text(value)

    make("0")
    seen, absent, stop = [], [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                at = os.open(folder, os.O_RDONLY)  # one folder, whatever it is called a moment later
            except FileNotFoundError:
                absent.append(True)
                continue
            try:
                names = [open(os.open(n, os.O_RDONLY, dir_fd=at), closefd=True) for n in ("a", "b")]  # noqa: SIM115
            except FileNotFoundError:
                continue  # it is being removed
            finally:
                os.close(at)
            seen.append(tuple(file.read() for file in names))

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(1, 40):
        make(str(value))
    stop.set()
    reader.join()
    assert how == "rename" or not absent
    assert seen and all(a == b for a, b in seen) and [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(ZeroDivisionError), whole_folder(folder):
        _ = 1 / 0
    assert (folder / "a").read_text() == "39" and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    (tmp_path / ".run.old").mkdir()
    (tmp_path / ".run.old" / "notes").write_text("mine")
    with whole_folder(tmp_path / "run") as made:
        assert (tmp_path / "run" / "notes").read_text() == "mine"
        (made / "f").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "f"]


def test_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = files._temporary(tmp_path / "run").name.split(".")[2].split("-")[0]
    left = tmp_path / f".run.{host}-{ended.pid}.tmp"
    kept = [tmp_path / name for name in (
        f".run.{host}-{os.getppid()}.tmp", f".run.00000000-{ended.pid}.tmp", f".run.b.{host}-{ended.pid}.tmp", ".run.tmp"
    )]  # fmt: skip
    for path in (left, *kept):
        path.mkdir()
    with whole_folder(tmp_path / "run"):
        pass
    assert not left.exists() and all(path.exists() for path in kept)


def test_a_stage_that_is_resumed_or_finished_holds_nothing_half_written(tmp_path):
    def crash(path):
        (path / "sub").mkdir()
        (path / "sub" / ".x.json.0a0b0c0d-7.tmp").write_text("half")
        (path / ".y.123.tmp").mkdir()
        raise RuntimeError("killed")

    def resume(path):
        assert [p.name for p in path.rglob("*")] == ["sub"]
        (path / ".z.0a0b0c0d-8.tmp").write_text("a straggler's")
        return {}

    with pytest.raises(RuntimeError):
        stage(tmp_path, "s", {}, crash)
    made = stage(tmp_path, "s", {}, resume)
    assert sorted(p.name for p in made.path.iterdir()) == ["manifest.json", "sub"] and made.manifest["files"] == {}


# ----------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 200_000, b'"text"'])
def test_a_file_that_holds_no_mapping_is_named_in_one_line(tmp_path, content):
    file = tmp_path / "f.json"
    file.write_bytes(content)
    for read in (read_json, read_sealed):
        with pytest.raises(UserError, match=r"f\.json: (is not JSON|holds a \w+, not a mapping)") as caught:
            read(file)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_json(file)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"[]", None])
def test_a_table_that_is_none_is_named_in_one_line(tmp_path, content):
    file = tmp_path / "t.parquet"
    pd.DataFrame({"a": range(100)}).to_parquet(file)
    assert len(read_table(file)) == 100
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=r"t\.parquet: is not a Parquet table") as caught:
        read_table(file)
    assert "\n" not in str(caught.value)


def test_no_byte_of_sealed_json_changes_unnoticed(tmp_path):
    file, value = tmp_path / "f.json", {"a": [1.5, None], "b": {"c": "d"}, "e": (1, 2)}
    write_sealed(file, value)
    assert read_sealed(file) == {**value, "e": [1, 2]}
    content = file.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1
        file.write_bytes(flipped)
        with suppress(UserError):
            assert read_sealed(file) == {**value, "e": [1, 2]}, at  # of what is no content: blanks
    file.write_text('{"a": 1}')
    with pytest.raises(Damaged, match="has no seal"):
        read_sealed(file)


def test_a_finished_stage_notices_sizes_always_and_bits_when_asked(tmp_path):
    def build(path):
        (path / "sub").mkdir()
        (path / "sub" / "shard").write_bytes(b"12345")
        (path / "attempts").write_text("whatever")
        (path / "table").write_text("1")
        return {}

    made = stage(tmp_path, "s", {}, build)
    assert list(made.manifest["files"]) == ["sub/shard", "table"]
    shard = made.path / "sub" / "shard"
    mend = f"; delete {made.path} and run again"

    def again(verify: bool = False):
        never = Stage("s", 1, {}, {}, lambda path, inputs, bench: pytest.fail("built again"))
        return Workspace(tmp_path, LocalBench(), verify).make(never)

    again(verify=True)
    (made.path / "table").write_text("2")
    with pytest.raises(Damaged, match="table: does not match its sha256"):
        again()
    (made.path / "table").write_text("1")
    (made.path / "attempts").write_text("more")
    shard.write_bytes(b"12346")
    with pytest.raises(Damaged) as caught:
        again(verify=True)
    assert str(caught.value) == f"{shard}: does not match its sha256{mend}"
    shard.write_bytes(b"1234")
    with pytest.raises(Damaged) as caught:
        again()
    assert str(caught.value) == f"{shard}: has 4 bytes, not 5{mend}"
    shard.unlink()
    with pytest.raises(Damaged, match=r"sub/shard: is missing; delete .*/stages/s-\w+ and run again"):
        again()
    (made.path / "manifest.json").write_text("{}")
    with pytest.raises(Damaged, match=r"manifest\.json: has no seal; delete .*/stages/s-\w+ and run again"):
        again()


def test_contents_are_of_files_and_compare_finds_the_first_that_differs(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "f").write_text("1")
    (tmp_path / "a").write_text("2")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / ".a.0a0b0c0d-7.tmp").write_text("half")
    listed = contents(tmp_path)
    assert list(listed) == ["a", "b/f"] and listed["a"]["bytes"] == 1
    compare(tmp_path, listed)
    (tmp_path / "b" / "f").write_text("3")
    compare(tmp_path, listed, hashed=lambda name: name == "a")
    with pytest.raises(Damaged, match="b/f: does not match its sha256"):
        compare(tmp_path, listed)


# ----------------------------------------------------------------------------------------------------------------------
# Names


BAD_NAMES = [
    "", " ", ".", "..", "../evil", "/abs", "a/b", "a\\b", "x" * 300, "é" * 120, ".hidden", "a\n", "a\x00b", "a\x7fb",
    " a", "a\u2028b", "\ud800", 3, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_folder_s_name_is_one_folder_s_name(name):
    with pytest.raises(UserError, match=r"^run: .* is not the name of a folder: ") as caught:
        folder_name(name, "run")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["run", "relu-64-0.05-blocks.1.resid_post", "a b", "läufe", "x" * 180])
def test_a_good_name_stays(name):
    assert folder_name(name, "run") == name


def test_a_link_that_leads_out_of_a_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures").symlink_to(tmp_path)
    (tmp_path / "run" / "real").mkdir()
    assert inside(tmp_path / "run", "real", "f") == tmp_path / "run" / "real" / "f"
    with pytest.raises(UserError, match=r"figures: leads out of .*run; remove the link"):
        inside(tmp_path / "run", "figures")
