"""Images made by hack/mkimage, skopeo and podman: what we unpack is what they unpack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from image_factory import folder, hardlink, item, layer, symlink, tree

from kvmsentry.image import open_image

ROOT = Path(__file__).resolve().parents[2]
MKIMAGE = [sys.executable, str(ROOT / "hack" / "mkimage")]

Podman = Callable[..., str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMSENTRY_STORE", str(tmp_path / "store"))
    return tmp_path


def run(*words: str | Path, **more: object) -> str:
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stderr
    return str(result.stdout)


def mkimage(*words: str | Path) -> None:
    if not shutil.which("dpkg-deb"):
        pytest.skip("hack/mkimage needs Debian's tools")
    run(*MKIMAGE, *words)


def opened(path: Path, ref: str | None = None) -> tuple[object, dict]:
    image = open_image(str(path), ref)
    os.close(image.hold)
    return image.config, tree(image.rootfs)


@pytest.fixture
def skopeo() -> str:
    return shutil.which("skopeo") or pytest.skip("skopeo is not installed")


@pytest.fixture
def podman() -> Iterator[Podman]:
    if not shutil.which("podman") or os.geteuid() != 0:
        pytest.skip("podman is not installed, or this is not root")
    top = Path(tempfile.mkdtemp(prefix="ks-"))  # podman takes 50 characters at most
    base = ["podman", "--root", top / "root", "--runroot", top / "run", "--tmpdir", top / "tmp",
            "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]  # fmt: skip
    yield lambda *words: run(*base, *words)
    subprocess.run([*map(str, base), "image", "umount", "--all"], capture_output=True, check=False)
    shutil.rmtree(top)


@pytest.fixture
def layered(home: Path) -> Path:
    """A directory of layer tars that use everything a layer may do to those below it."""
    layers = [
        layer(
            folder("etc"), item("etc/a", b"1", mode=0o640, uid=5, gid=6), folder("opaque"), item("opaque/old/x", b"2"),
            item("gone", b"3"), folder("dir-gone"), item("dir-gone/x", b"4"), symlink("lib", "usr/lib"),
            folder("usr/lib"), item("file-to-dir", b"5"), folder("dir-to-file"), item("dir-to-file/x", b"6"),
            item("linked", b"7"),
            item("shadow", b"8", mode=0o4711), folder("sticky", mode=0o1777),
        ),
        layer(
            item(".wh.gone"), item(".wh.dir-gone"),
            folder("opaque"), item("opaque/.wh..wh..opq"), item("opaque/new", b"9"),
            folder("file-to-dir", mode=0o700), item("file-to-dir/y", b"10"), item("dir-to-file", b"11"),
            hardlink("linked-too", "linked"), item("etc/a", b"12", mode=0o600), folder("etc", mode=0o750, gid=7),
        ),
        layer(item("linked", b"13"), item("opaque/.wh.new"), folder("dir-gone"), item("dir-gone/z", b"14")),
    ]  # fmt: skip
    paths = []
    for number, data in enumerate(layers):
        paths.append(home / f"layer{number}.tar")
        paths[-1].write_bytes(data)
    mkimage("dir", home / "layered.tar", *paths, "--tag", "localhost/layered:1")
    return home / "layered.tar"


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("layout", ["docker", "oci"])
def test_mkimage_busybox(home: Path, layout: str, compression: str) -> None:
    options = [
        "--format",
        layout,
        "--compression",
        compression,
        "--env",
        "A=b",
        "--user",
        "user",
        "--entrypoint",
        '["sh"]',
    ]
    mkimage("busybox", home / "a.tar", *options)
    mkimage("busybox", home / "b.tar", *options)
    assert (home / "a.tar").read_bytes() == (home / "b.tar").read_bytes()
    config, found = opened(home / "a.tar")
    assert config.entrypoint == ["sh"] and config.user == "user" and "A=b" in config.env  # type: ignore[attr-defined]
    assert found["bin/ls"][4] == b"busybox" and found["tmp"][0] == "0o41777"


@pytest.mark.parametrize("layout", ["docker", "oci"])
def test_skopeo_reads_mkimage(home: Path, skopeo: str, layout: str) -> None:
    mkimage("busybox", home / "a.tar", "--format", layout, "--compression", "gzip", "--label", "x=y", "--expose", "80")
    config = json.loads(run(skopeo, "inspect", "--config", f"{layout}-archive:{home / 'a.tar'}"))["config"]
    assert config["Labels"] == {"x": "y"} and config["ExposedPorts"] == {"80/tcp": {}}


def test_skopeo_copies(home: Path, skopeo: str, layered: Path) -> None:
    wanted = opened(layered)[1]
    run(skopeo, "copy", f"docker-archive:{layered}", f"oci-archive:{home}/o.tar:tag")
    run(skopeo, "copy", f"docker-archive:{layered}", f"oci:{home}/dir:tag")
    run(skopeo, "copy", "--dest-compress", "--dest-compress-format", "zstd", f"oci-archive:{home}/o.tar",
        f"oci-archive:{home}/z.tar")  # fmt: skip
    run(skopeo, "copy", f"oci-archive:{home}/o.tar", f"docker-archive:{home}/d.tar:localhost/again:1")
    for name in ("o.tar", "dir", "z.tar", "d.tar"):
        shutil.rmtree(home / "store")
        assert opened(home / name)[1] == wanted, name


def test_podman_unpacks_the_same_and_saves_what_we_read(home: Path, podman: Podman, layered: Path) -> None:
    podman("load", "-i", layered)
    mounted = Path(podman("image", "mount", "localhost/layered:1").strip())
    ours, theirs = opened(layered)[1], tree(mounted)
    for name in ("proc", "sys", "dev", "run", "tmp"):  # podman prepares mount points
        theirs.pop(name, None)
    ours["."] = theirs["."] = ()  # no layer describes the root itself
    implied = {"opaque", "usr"}  # times of folders that no entry describes, or that lost something later
    for name in implied:
        ours[name], theirs[name] = ours[name][:3], theirs[name][:3]
    # podman's vfs driver copies a layer's files one by one, which parts hard links; contents are what counts
    assert {name: row[:5] for name, row in ours.items()} == {name: row[:5] for name, row in theirs.items()}
    for form in ("docker-archive", "oci-archive", "oci-dir"):
        podman("save", "--format", form, "-o", home / form, "localhost/layered:1")
        shutil.rmtree(home / "store")
        assert opened(home / form)[1] | {".": ()} | {name: ours[name] for name in implied} == ours, form


def test_podman_saves_several(home: Path, podman: Podman, layered: Path) -> None:
    mkimage("busybox", home / "busybox.tar")
    podman("load", "-i", home / "busybox.tar")
    podman("load", "-i", layered)
    podman("save", "-m", "-o", home / "both.tar", "localhost/busybox:latest", "localhost/layered:1")
    assert "linked" in opened(home / "both.tar", "layered:1")[1]
    assert "bin/busybox" in opened(home / "both.tar", "busybox")[1]


AS_USER = """
import os, sys
from kvmsentry.image import list_images, open_image, remove_image, resolve_user
from kvmsentry.image.owners import load_owners
image = open_image(sys.argv[1])
owners = load_owners(image.owners)
assert owners.everyone and owners.entries[b"home/user"][:3] == (1000, 1000, 0o755), owners
assert owners.entries[b"tmp"].mode == 0o1777
assert resolve_user(image.rootfs, "user").uid == 1000
assert os.stat(image.rootfs).st_uid == os.stat(image.rootfs + "/home/user").st_uid == os.geteuid()
os.close(image.hold)
remove_image(image.id)
assert list_images() == []
print("fine")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes two kinds of ordinary user")
@pytest.mark.parametrize(
    "become", ["setpriv --reuid 65534 --regid 65534 --clear-groups", "unshare --user --map-root-user"]
)
def test_ordinary_users(home: Path, become: str) -> None:
    """Someone without rights, and root of a user namespace that knows one id only."""
    mkimage("busybox", home / "a.tar")
    for path in [home, *home.parents][:4]:
        if path != Path("/tmp"):
            os.chmod(path, 0o755)
    store = Path(tempfile.mkdtemp(prefix="ks-"))
    try:
        if become.startswith("setpriv"):
            os.chown(store, 65534, 65534)
        environment = {**os.environ, "KVMSENTRY_STORE": str(store / "store"), "PYTHONPATH": str(ROOT)}
        assert run(*become.split(), sys.executable, "-c", AS_USER, home / "a.tar", env=environment) == "fine\n"
        assert [path for path in store.rglob("*") if path.is_file()] == []
    finally:
        shutil.rmtree(store)
