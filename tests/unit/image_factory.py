"""Makes small image archives, whole and broken, for the tests of the image floor."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

Item = tuple[str, dict[str, Any], bytes]


def item(name: str, data: bytes = b"", **fields: Any) -> Item:
    """A tar member: fields of tarfile.TarInfo (type, mode, uid, gid, mtime, linkname, pax_headers...)."""
    return name, fields, data


def folder(name: str, **fields: Any) -> Item:
    return item(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str, **fields: Any) -> Item:
    return item(name, type=tarfile.SYMTYPE, linkname=target, **{"mode": 0o777, **fields})


def hardlink(name: str, target: str) -> Item:
    return item(name, type=tarfile.LNKTYPE, linkname=target)


def layer(*items: Item, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, fields, data in items:
            info = tarfile.TarInfo(name)
            info.mode, info.mtime, info.size = 0o644, 1_700_000_000, len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def packed(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    return data


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def config(layers: Iterable[bytes], inner: dict[str, Any] | None = None, **top: Any) -> bytes:
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/true"]} if inner is None else inner,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha(plain)}" for plain in layers]},
        **top,
    }
    return json.dumps(document).encode()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(layer(*(item(name, data) for name, data in members.items()), format=tarfile.USTAR_FORMAT))
    return path


def docker_members(
    layers: list[bytes],
    compression: str = "none",
    tags: tuple[str, ...] = ("test:latest",),
    document: bytes | None = None,
) -> dict[str, bytes]:
    document = config(layers) if document is None else document
    members = {f"{sha(plain)}.tar": packed(plain, compression) for plain in layers}
    name = f"{sha(document)}.json"
    members[name] = document
    manifest = [{"Config": name, "RepoTags": list(tags), "Layers": [f"{sha(plain)}.tar" for plain in layers]}]
    members["manifest.json"] = json.dumps(manifest).encode()
    return members


def docker_archive(path: Path, layers: list[bytes], **options: Any) -> Path:
    return write_tar(path, docker_members(layers, **options))


class OciLayout:
    """An OCI layout that is put together blob by blob."""

    def __init__(self) -> None:
        self.members = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        self.members[f"blobs/sha256/{sha(data)}"] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{sha(data)}", "size": len(data)}

    def manifest(self, layers: list[bytes], compression: str = "none", document: bytes | None = None) -> dict[str, Any]:
        document = config(layers) if document is None else document
        suffix = "" if compression == "none" else f"+{compression}"
        body = {
            "schemaVersion": 2,
            "config": self.blob(document, "config.v1+json"),
            "layers": [self.blob(packed(plain, compression), f"layer.v1.tar{suffix}") for plain in layers],
        }
        return self.blob(json.dumps(body).encode(), "manifest.v1+json")

    def index(self, manifests: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
        return self.blob(json.dumps(body).encode(), "index.v1+json")

    def add(self, descriptor: dict[str, Any], tag: str | None = None, platform: str | None = None) -> None:
        if tag is not None:
            descriptor = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}
        if platform is not None:
            system, _, architecture = platform.partition("/")
            descriptor = {**descriptor, "platform": {"os": system, "architecture": architecture}}
        self.manifests.append(descriptor)

    def write(self, path: Path) -> Path:
        index = json.dumps({"schemaVersion": 2, "manifests": self.manifests}).encode()
        return write_tar(path, {**self.members, "index.json": index})

    def write_directory(self, path: Path) -> Path:
        index = json.dumps({"schemaVersion": 2, "manifests": self.manifests}).encode()
        for name, data in {**self.members, "index.json": index}.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path


def tree(root: str | Path) -> dict[str, tuple[Any, ...]]:
    """What `root` holds: type, mode, owner, times to the nanosecond, content or target, link count, capability."""
    found: dict[str, tuple[Any, ...]] = {}
    top = os.fsencode(root)
    for where, folders, files in os.walk(top):
        for name in [b"."] * (where == top) + folders + files:
            path = os.path.join(where, name)
            status = os.lstat(path)
            kind = status.st_mode >> 12
            content: Any = None
            if kind == 0o12:
                content = os.readlink(path)
            elif kind == 0o10:
                with open(path, "rb") as file:
                    content = sha(file.read())
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in _xattrs(path)}
            found[os.fsdecode(os.path.relpath(path, top))] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                content,
                status.st_nlink if kind != 0o4 else 0,
                xattrs,
            )
    return found


def _xattrs(path: bytes) -> list[str]:
    return [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(("user.", "security.cap"))]


def census(store: Path) -> tuple[int, list[str]]:
    """Open descriptors of this process, and what lies about in a store that should not."""
    left = [str(path.relative_to(store)) for path in store.rglob("*") if path.parent.name == "tmp"]
    return len(os.listdir("/proc/self/fd")), left
