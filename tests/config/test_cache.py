"""The cache directory is private or it is not used; a file appears whole or not at all."""

import os
import stat
import sys

import pytest

from config.cache import atomic_write, cache_dir, cache_location


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_variable_names_the_directory_and_it_is_made_private(tmp_path):
    wanted = tmp_path / "not" / "yet"
    old = os.umask(0)
    try:
        assert cache_dir({"TORCHCHAT_CACHE_DIR": str(wanted)}) == wanted
    finally:
        os.umask(old)
    assert mode(wanted) == mode(wanted.parent) == 0o700


def test_an_empty_directory_is_made_private(tmp_path):
    tmp_path.chmod(0o777)
    assert cache_dir({"TORCHCHAT_CACHE_DIR": str(tmp_path)}) == tmp_path
    assert mode(tmp_path) == 0o700


@pytest.mark.parametrize(("permissions", "used"), [(0o755, True), (0o775, False), (0o777, False)])
def test_a_directory_with_files_is_never_changed_and_not_used_if_others_may_write(tmp_path, permissions, used):
    (tmp_path / "something").touch()
    tmp_path.chmod(permissions)
    assert cache_dir({"TORCHCHAT_CACHE_DIR": str(tmp_path)}) == (tmp_path if used else None)
    assert mode(tmp_path) == permissions


def test_without_the_variable_the_platform_decides(tmp_path, monkeypatch):
    assert cache_location({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "torchchat"
    monkeypatch.setenv("HOME", str(tmp_path))
    default = "Library/Caches" if sys.platform == "darwin" else ".cache"
    assert cache_location({}) == tmp_path / default / "torchchat"
    assert cache_location({"XDG_CACHE_HOME": "relative/is/ignored"}) == tmp_path / default / "torchchat"


@pytest.mark.parametrize("below", ["a-file", "a-file/deeper"])
def test_a_place_that_cannot_be_a_directory_is_none(tmp_path, below):
    (tmp_path / "a-file").touch()
    assert cache_dir({"TORCHCHAT_CACHE_DIR": str(tmp_path / below)}) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_none(tmp_path):
    tmp_path.chmod(0o500)
    assert cache_dir({"TORCHCHAT_CACHE_DIR": str(tmp_path / "new")}) is None


def test_write_replaces_whole_and_private(tmp_path):
    path = tmp_path / "deep" / "file"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
