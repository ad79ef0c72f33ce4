"""The store: every image unpacked once, found again in a millisecond.

    STORE/1/
      images/ID.json     config, tags, chain; ID is the sha256 of the config document
      rootfs/CHAIN/      fs/ (the merged files), meta.json, owners.json
      seen/KEY.json      which image a file held when it had this device, inode, size and times
      tmp/CHAIN/         a rootfs under construction; renamed to rootfs/CHAIN when it is whole

Whoever uses or builds a rootfs holds flock(2) on its directory: exclusively while it is built or removed, shared while
it is run from. The directory's inode is the lock, so nothing is left behind but what a killed process was writing, and
that is swept by the next one that unpacks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kvmsentry.errors import HostError, UserError
from kvmsentry.image.config import ImageConfig

VERSION = "1"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FRESH_NS = 20_000_000  # a file written this short ago may change again within its time stamp's grain

Progress = Callable[[int, int], None]
"""progress(done, total): bytes of the image's packed layers that have been read, of how many."""


@dataclass(slots=True)
class Image:
    """An unpacked image. `rootfs` is the path of its root directory; nothing may write there.

    `owners` is the path of the map of owners and modes that the host's files could not take (see `owners.load_owners`),
    "" when they all could. `devices` lists device nodes, which are never made on the host:
    {"path", "type" ("c" or "b"), "major", "minor", "mode", "uid", "gid"}. `hold` is a descriptor with the shared lock
    that keeps the files from being removed; the image is held until it or the process is closed.
    """

    id: str
    tags: list[str]
    config: ImageConfig
    rootfs: str
    owners: str
    devices: list[dict[str, Any]]
    size: int
    entries: int
    source: str
    hold: int = -1


def store_path() -> str:
    """$KVMSENTRY_STORE, else /var/lib/kvmsentry for root, else $XDG_DATA_HOME/kvmsentry (~/.local/share/kvmsentry)."""
    if path := os.environ.get("KVMSENTRY_STORE"):
        return os.path.abspath(path)
    if os.geteuid() == 0:
        return "/var/lib/kvmsentry"
    data = os.environ.get("XDG_DATA_HOME", "")
    return os.path.join(data if os.path.isabs(data) else os.path.expanduser("~/.local/share"), "kvmsentry")


def open_image(path: str, ref: str | None = None, progress: Progress | None = None) -> Image:
    """The image in file or directory `path`, unpacked into the store unless it is there already.

    `ref` (a tag, or the start of an id) chooses among several. UserError names the file and its fault; HostError when
    the host refuses (a full disk, a store that may not be written).
    """
    from kvmsentry.image.faults import ImageFault

    path = os.fspath(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'is no file name'}") from None
    store = _Store(store_path())
    if (image := store.seen(path, status, ref)) is not None:
        return image
    try:
        return store.unpack(path, ref, progress)
    except ImageFault as fault:
        raise UserError(f"{path}: {fault}") from None
    except OSError as error:
        raise _refused(f"unpack {path} into {store.path}", error, store.path) from None


def list_images() -> list[Image]:
    """Every image in the store, by tag and id; none is held."""
    store = _Store(store_path())
    images = [image for name in store.names("images") if (image := store.load(name, hold=False)) is not None]
    return sorted(images, key=lambda image: (image.tags[:1], image.id))


def find_image(name: str) -> str:
    """The id of the stored image with tag or (start of an) id `name`. UserError for none or several."""
    from kvmsentry.image.layout import short_names

    bare = name.removeprefix("sha256:")
    images = list_images()
    found = [image.id for image in images if any(name in short_names(tag) for tag in image.tags)]
    if not found and len(bare) >= 4:
        found = [image.id for image in images if image.id.startswith(bare)]
    if len(found) == 1:
        return found[0]
    raise UserError(f"{name}: {'several images have this name, give the id' if found else 'no such image'}")


def remove_image(name: str) -> str:
    """Forget an image and, when no other has the same files, remove those; returns its id.

    UserError when there is no such image or a sandbox is using it.
    """
    image_id = find_image(name)
    store = _Store(store_path())
    try:
        store.remove(image_id)
    except OSError as error:
        raise _refused(f"remove image {image_id[:12]}", error, store.path) from None
    return image_id


def _refused(operation: str, error: OSError, path: str) -> HostError:
    mend = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        mend = f"make room in {path}, remove images, or set KVMSENTRY_STORE to a place elsewhere"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        mend = f"make {path} writable or set KVMSENTRY_STORE to a directory that is"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        mend = "raise the limit on open files (ulimit -n)"
    return HostError(operation, error.errno or errno.EIO, mend)


class _Store:
    def __init__(self, path: str) -> None:
        self.path = path
        self.base = os.path.join(path, VERSION)

    # ------------------------------------------------------------------------------------------------- reading

    def seen(self, path: str, status: os.stat_result, ref: str | None) -> Image | None:
        """The image that this very file held the last time, without reading it."""
        note = self._read("seen", _key(path, ref))
        if note is None or (note.get("stamp"), note.get("of")) != (_stamp(path, status), _origin(path, ref)):
            return None
        return self.load(note["image"])

    def load(self, image_id: str, hold: bool = True) -> Image | None:
        """A stored image, None when it is not there (any more)."""
        record = self._read("images", image_id)
        if record is None:
            return None
        folder = os.path.join(self.base, "rootfs", record["chain"])
        fd = -1
        if hold:
            try:
                fd = os.open(folder, _FOLDER)
            except FileNotFoundError:
                return None
            fcntl.flock(fd, fcntl.LOCK_SH)
            if not _is_at(fd, folder):
                os.close(fd)
                return None
        meta = self._read(os.path.join("rootfs", record["chain"]), "meta")
        if meta is None:
            if fd >= 0:
                os.close(fd)
            return None
        return Image(
            id=image_id,
            tags=record["tags"],
            config=ImageConfig(**record["config"]),
            rootfs=os.path.join(folder, "fs"),
            owners=os.path.join(folder, "owners.json") if meta["owners"] else "",
            devices=meta["devices"],
            size=meta["bytes"],
            entries=meta["entries"],
            source=record["source"],
            hold=fd,
        )

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(name[:-5] for name in os.listdir(os.path.join(self.base, folder)) if name.endswith(".json"))
        except FileNotFoundError:
            return []

    def _read(self, folder: str, name: str) -> dict[str, Any] | None:
        """One of our own documents; None when it is missing or was cut short by a crash of the host."""
        try:
            with open(os.path.join(self.base, folder, f"{name}.json"), "rb") as file:
                value = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except PermissionError as error:
            raise _refused(f"read the store {self.path}", error, self.path) from None
        return value if isinstance(value, dict) else None

    # ------------------------------------------------------------------------------------------------- writing

    def _write(self, folder: str, name: str, value: dict[str, Any]) -> None:
        path = os.path.join(self.base, folder, f"{name}.json")
        temporary = f"{path}.{os.getpid()}"
        try:
            with open(temporary, "w", encoding="ascii") as file:
                json.dump(value, file)
            os.replace(temporary, path)
        except BaseException:
            _unlink(temporary)
            raise

    def _prepare(self) -> None:
        """Directories that only their owner enters: there are set-uid programs of strangers inside."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        for name in ("", "images", "rootfs", "seen", "tmp"):
            os.makedirs(os.path.join(self.base, name), mode=0o700, exist_ok=True)

    def unpack(self, path: str, ref: str | None, progress: Progress | None) -> Image:
        from kvmsentry.image.archive import open_archive
        from kvmsentry.image.faults import Limits
        from kvmsentry.image.layout import select_image

        limits = Limits()
        self._prepare()
        started = time.time_ns()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        status = os.fstat(fd)
        archive = open_archive(fd, limits, os.path.join(self.base, "tmp"))
        try:
            selected = select_image(archive, ref)
            chain = selected.chain_id
            while True:
                with self._building(chain) as folder:
                    if folder is not None:
                        from kvmsentry.image.merge import merge_layers

                        merge_layers(archive, selected.layers, folder, limits, progress)
                        self._sweep()
                record = {
                    "config": asdict(selected.config),
                    "chain": chain,
                    "tags": _merged(self._read("images", selected.id), selected.tags),
                    "source": os.path.abspath(path),
                }
                self._write("images", selected.id, record)
                if (image := self.load(selected.id)) is not None:
                    break  # else somebody removed it meanwhile
        finally:
            archive.close()
        stamp = _stamp(path, status)
        if stamp == _stamp(path, os.stat(path)) and started - status.st_mtime_ns > _FRESH_NS:
            self._write("seen", _key(path, ref), {"stamp": stamp, "image": image.id, "of": _origin(path, ref)})
        return image

    @contextmanager
    def _building(self, chain: str) -> Iterator[str | None]:
        """The directory to build a rootfs in, locked; None when it exists already. Renamed into place at the end.

        S1: two start at once: the second waits in flock and then finds the rootfs, or builds when the first failed.
        S2: the first failed and removed the directory that the second has locked: the second makes another.
        """
        final = os.path.join(self.base, "rootfs", chain)
        folder = os.path.join(self.base, "tmp", chain)
        while True:
            if os.path.exists(os.path.join(final, "meta.json")):
                yield None
                return
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                pass
            try:
                lock = os.open(folder, _FOLDER)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_at(lock, folder):
                    continue
                self._empty(lock)
                try:
                    yield folder
                    os.rename(folder, final)
                except BaseException:
                    self._empty(lock)
                    os.rmdir(folder)
                    raise
                return
            finally:
                os.close(lock)

    def _empty(self, fd: int) -> None:
        from kvmsentry.image.beneath import remove_tree

        for name in os.listdir(fd):
            remove_tree(fd, os.fsencode(name))

    def _sweep(self) -> None:
        """Remove what killed processes left in tmp: directories that nobody has locked."""
        top = os.path.join(self.base, "tmp")
        for name in os.listdir(top):
            path = os.path.join(top, name)
            try:
                fd = os.open(path, _FOLDER)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, path):
                    self._empty(fd)
                    os.rmdir(path)
            except BlockingIOError:
                continue
            finally:
                os.close(fd)

    def remove(self, image_id: str) -> None:
        record = self._read("images", image_id)
        if record is None:
            raise UserError(f"{image_id[:12]}: no such image")
        chain = record["chain"]
        others = [other for name in self.names("images") if name != image_id and (other := self._read("images", name))]
        shared = any(other["chain"] == chain for other in others)
        if not shared:
            self._remove_rootfs(chain, image_id)
        _unlink(os.path.join(self.base, "images", f"{image_id}.json"))
        for key in self.names("seen"):
            note = self._read("seen", key)
            if note is None or note.get("image") == image_id:
                _unlink(os.path.join(self.base, "seen", f"{key}.json"))

    def _remove_rootfs(self, chain: str, image_id: str) -> None:
        final = os.path.join(self.base, "rootfs", chain)
        try:
            fd = os.open(final, _FOLDER)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Out of sight first, so that nobody finds half of it: without meta.json it is no rootfs.
            doomed = os.path.join(self.base, "tmp", f"gone.{chain[:16]}.{os.getpid()}")
            os.rename(final, doomed)
            self._empty(fd)
            os.rmdir(doomed)
        except BlockingIOError:
            raise UserError(f"{image_id[:12]}: the image is in use") from None
        finally:
            os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _stamp(path: str, status: os.stat_result) -> list[int]:
    """What must be the same for a file to hold the same: for a directory its index, which names the rest by digest."""
    stamp = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if os.path.isdir(path):
        try:
            index = os.stat(os.path.join(path, "index.json"))
        except OSError:
            return stamp
        stamp += [index.st_ino, index.st_size, index.st_mtime_ns, index.st_ctime_ns]
    return stamp


def _key(path: str, ref: str | None) -> str:
    """A short name for the note about a path; two paths with one name only displace each other, as the note says whose
    it is. (hashlib would cost 3 ms of start-up.)"""
    origin = "\0".join(_origin(path, ref)).encode(errors="surrogateescape")
    return f"{zlib.crc32(origin):08x}{zlib.adler32(origin):08x}"


def _origin(path: str, ref: str | None) -> list[str]:
    return [os.path.abspath(path), ref or ""]


def _merged(record: dict[str, Any] | None, tags: list[str]) -> list[str]:
    return list(dict.fromkeys([*tags, *(record["tags"] if record else [])]))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
