"""Names come when the disk has what they name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mergekit_ext.host.staging import staged
from mergekit_ext.io.durable import appear, flush
from peft_merge.io.place import new_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="folders are not opened there")


@pytest.fixture
def flushed(monkeypatch):
    """The inodes that the disk was made to take, in order, and whether the output was there."""
    seen = []

    def fsync(descriptor):
        seen.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def inode(path):
    return path.stat().st_ino


def test_files_come_before_their_folders_and_links_once(tmp_path, flushed):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/one", "a/b/two"):
        (tmp_path / name).write_text(name)
    os.link(tmp_path / "a/one", tmp_path / "a/b/three")
    (tmp_path / "a" / "nowhere").symlink_to("there")
    flush(tmp_path / "a")
    assert len(flushed) == len(set(flushed)) == 4
    places = {name: flushed.index(inode(tmp_path / name)) for name in ("a", "a/b", "a/one")}
    assert places["a/one"] < places["a/b"] < places["a"] == 3


def _staged(target):
    with staged(target) as folder:
        (folder / "model.safetensors").write_bytes(b"new")
        yield folder / "model.safetensors"


def _adapter(target):
    with new_folder(target, "an adapter") as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"new")
        yield folder / "adapter_model.safetensors"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("write", [_staged, _adapter])
def test_an_output_has_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch, write, existing):
    target, events = tmp_path / "out", []
    if existing:
        target.mkdir()
    sync, replaces = os.fsync, {name: getattr(Path, name) for name in ("replace", "rename")}

    def fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def moved(name):
        def move(self, to):
            events.append(("moved", Path(to).name))
            return replaces[name](self, to)

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    for name in replaces:
        monkeypatch.setattr(Path, name, moved(name))
    for file in write(target):
        wanted = inode(file)
    (name,) = (path.name for path in target.iterdir())
    moves = [i for i, event in enumerate(events) if event in {("moved", "out"), ("moved", name)}]
    assert events.index(wanted) < moves[-1]
    assert moves[-1] < len(events) - 1, "the folder that names it comes last"


def test_a_disk_that_cannot_be_asked_is_believed_and_one_that_fails_is_not(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    codes = [errno.EINVAL]

    def fsync(descriptor):
        raise OSError(codes[0], os.strerror(codes[0]))

    monkeypatch.setattr(os, "fsync", fsync)
    flush(tmp_path / "a")
    codes[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        appear(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
