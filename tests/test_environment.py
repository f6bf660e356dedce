"""The environment names this code's commit, and no other's."""

import subprocess

import pytest

from raysae.environment import code_version, environment


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
    )


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    return package


def test_a_checkout_has_a_commit_and_is_dirty_once_the_package_changes(checkout):
    clean = code_version(checkout)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (checkout.parent / "notes.txt").write_text("outside of the package\n")
    assert code_version(checkout) == clean
    (checkout / "new.py").write_text("b = 2\n")
    assert code_version(checkout) == {"commit": clean["commit"], "dirty": True}


def test_a_virtual_environment_in_somebodys_checkout_has_no_commit(checkout):
    installed = checkout.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("a = 1\n")
    assert code_version(installed) == {"commit": None, "dirty": None}


def test_it_says_what_bits_depend_on_and_nothing_of_who_ran_it(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-a-user")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment()
    assert found["packages"]["torch"] and found["threads"] >= 1 and found["cpus"] >= 1 and found["cpu"]
    assert found["settings"]["OMP_NUM_THREADS"] == "1"
    assert "secret-of-a-user" not in str(found)
