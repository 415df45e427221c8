"""Files and folders are complete at every moment, whatever interrupts, fills the disk, or writes at the same time."""

from __future__ import annotations

import os
import shutil
from multiprocessing import get_context
from pathlib import Path

import pytest
from kill_points import in_child, interrupt_everywhere, tree_of

from electra_composer import atomic_files
from electra_composer.atomic_files import remove, replace_link, replaced_file, replaced_folder, restore, write_file


def fill(folder, content):
    (Path(folder) / "sub").mkdir()
    for name in ("a", "sub/b"):
        (Path(folder) / name).write_text(content)


@pytest.mark.parametrize("former", [False, True])
def test_a_killed_write_leaves_the_former_file_or_the_new_one(tmp_path, former):
    def prepare(folder):
        if former:
            (folder / "file").write_text("former")

    def intact(folder):
        content = (folder / "file").read_text() if (folder / "file").exists() else None
        assert content in ("former" if former else None, "new")

    calls = interrupt_everywhere(
        tmp_path, lambda folder: write_file(str(folder / "file"), "new"), prepare, intact=intact
    )
    assert {"after open .unfinished-file", "before replace .unfinished-file"} <= set(calls)


@pytest.mark.parametrize("former", [False, True])
def test_a_killed_write_leaves_the_former_folder_or_the_new_one(tmp_path, former):
    def operate(folder):
        with replaced_folder(str(folder / "out")) as unfinished:
            fill(unfinished, "new")

    def prepare(folder):
        if former:
            (folder / "out").mkdir()
            fill(folder / "out", "former")

    def intact(folder):
        found = [tree_of(folder / name) for name in ("out", ".replaced-out") if (folder / name).exists()]
        assert found or not former
        assert all(set(tree.values()) in ({None, b"former"}, {None, b"new"}) and len(tree) == 3 for tree in found)

    calls = interrupt_everywhere(tmp_path, operate, prepare, intact=intact)
    assert ("before rename out" in calls) == former
    assert "before rename .unfinished-out" in calls


def test_a_killed_removal_leaves_a_complete_folder_or_none(tmp_path):
    def operate(folder):
        restore(str(folder / "out"))
        remove(str(folder / "out"))

    def prepare(folder):
        (folder / "out").mkdir()
        fill(folder / "out", "mine")

    def intact(folder):
        assert not (folder / "out").exists() or len(tree_of(folder / "out")) == 3

    interrupt_everywhere(tmp_path, operate, prepare, intact=intact)


def test_a_killed_change_leaves_a_link(tmp_path):
    def prepare(folder):
        for name in ("a", "b"):
            (folder / name).write_text(name)
        (folder / "link").symlink_to("a")

    def intact(folder):
        assert (folder / "link").read_text() in ("a", "b")

    def operate(folder):
        replace_link(str(folder / "link"), str(folder / "b"))

    interrupt_everywhere(tmp_path, operate, prepare, intact=intact)


def fail_to_rename_new_folders(source, target, rename=os.rename):
    if os.path.basename(source) == ".unfinished-out" and os.path.basename(target) == "out":
        raise PermissionError
    rename(source, target)


def test_an_error_leaves_what_was_there(tmp_path, monkeypatch):
    write_file(str(tmp_path / "file"), "former")
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "former")
    before = tree_of(tmp_path)
    with pytest.raises(TypeError), replaced_file(str(tmp_path / "file")) as file:
        file.writelines([b"half", None])
    with pytest.raises(TypeError), replaced_folder(str(tmp_path / "out")) as folder:
        fill(folder, None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_to_rename_new_folders)
        with pytest.raises(PermissionError), replaced_folder(str(tmp_path / "out")) as folder:
            fill(folder, "new")
    with pytest.raises(FileExistsError), replaced_folder(str(tmp_path / "out"), replace=False):
        pass
    with pytest.raises(FileExistsError), replaced_folder(str(tmp_path / "file")):
        pass
    with pytest.raises(IsADirectoryError):
        write_file(str(tmp_path / "out"), "a folder's name")
    assert tree_of(tmp_path) == before


def test_a_file_behind_a_link_and_a_device(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("folder/file")
    write_file(str(tmp_path / "link"), "content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder/file").read_text() == "content"
    write_file(os.devnull, "nothing")
    assert not Path(os.devnull).is_file()
    with pytest.raises(OSError, match="No space left"):
        write_file("/dev/full", "content")
    monkeypatch.chdir(tmp_path)
    write_file("plain", "content")
    assert (tmp_path / "plain").read_text() == "content"


def _write_many(folder, number):
    for _ in range(30):
        write_file(f"{folder}/file", f"{number}" * 1000)
        with replaced_folder(f"{folder}/out") as unfinished:
            fill(unfinished, f"{number}")


def test_processes_that_write_at_once_wait_for_each_other(tmp_path):
    processes = [get_context("fork").Process(target=_write_many, args=(str(tmp_path), number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert set((tmp_path / "file").read_text()) < set("012")
    assert len(set(tree_of(tmp_path / "out").values())) == 2  # None for the folder `sub`, and one content
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    former = os.umask(umask)
    try:
        write_file(str(tmp_path / "new/file"), "content")
        with replaced_folder(str(tmp_path / "new/out")) as folder:
            fill(folder, "content")
            os.chmod(f"{folder}/a", 0o600)  # as safetensors creates files
    finally:
        os.umask(former)
    paths = list((tmp_path / "new").rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o777 & ~umask}


def test_only_what_has_this_modules_names_is_removed_recursively(tmp_path, monkeypatch):
    removed = []
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda path, **_: removed.append(os.path.basename(path)))
    for name in ("a", ".unfinished-b", ".removed-c", ".replaced-d"):
        os.makedirs(tmp_path / name / "sub")
        remove(str(tmp_path / name))
    assert removed == [".removed-a", ".unfinished-b", ".removed-c", ".removed-d"]


def test_an_interrupted_process_of_the_tests_removes_nothing_outside(tmp_path):
    """The tests of interruptions delete many files: in their processes, only those of the test can be deleted."""
    mine, outside = tmp_path / "mine", tmp_path / "outside"
    mine.mkdir()
    outside.mkdir()
    (outside / "file").write_text("x")
    for attempt in (
        lambda: shutil.rmtree(outside),
        lambda: os.remove(outside / "file"),
        lambda: (outside / "file").rename(mine / "file"),
        lambda: os.rmdir(outside),
    ):
        with pytest.raises(AssertionError, match="outside the test's folder"):
            in_child(mine, attempt)
    assert (outside / "file").exists()
