"""One run at a time writes a file, and nothing is left of folders that were made in vain."""

import errno
import os

import pytest

from deepstyle_app import locks
from deepstyle_app.locks import folder_for, lock_of
from deepstyle_support.messages import UserError


@pytest.mark.parametrize("name", ["link.csv", "folder/a.csv"])
def test_a_lock_is_of_the_file_by_whatever_name(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "real" / "a.csv")
    (tmp_path / "folder").symlink_to("real")
    with (
        lock_of(tmp_path / "real" / "a.csv"),
        pytest.raises(UserError, match=rf"another run is writing '.*{name}'"),
        lock_of(tmp_path / name),
    ):
        pass
    with lock_of(tmp_path / name) as note:
        assert note == ""
    assert os.listdir(tmp_path / "real") == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, 524])
def test_where_there_are_no_locks_it_goes_on_without_and_says_so(tmp_path, monkeypatch, number):
    def refuse(file, how):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with lock_of(tmp_path / "a") as note:
        assert note == f"the file system of '{tmp_path}' has no locks: see that no other run writes there"
        assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write in the folder .*: "),
        folder_for(tmp_path / "file" / "new" / "a"),
    ):
        pass


def test_of_the_folders_that_are_made_only_those_with_something_in_them_stay(tmp_path):
    (tmp_path / "there").mkdir()
    with folder_for(tmp_path / "there" / "new" / "deep" / "a"), folder_for(tmp_path / "there" / "b"):
        assert (tmp_path / "there" / "new" / "deep").is_dir()
    assert os.listdir(tmp_path / "there") == []
    with folder_for(tmp_path / "new" / "deep" / "a"):
        (tmp_path / "new" / "b").touch()
    assert os.listdir(tmp_path / "new") == ["b"]
