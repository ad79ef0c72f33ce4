"""Layers to files: the same as GNU tar for one layer, OCI's rules for several, nothing outside the root ever."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from image_factory import folder, hardlink, item, layer, symlink, tree

from kvmsentry.image.faults import ImageFault, Limits
from kvmsentry.image.tar import TarReader
from kvmsentry.image.unpack import Unpacker

ROOT = os.geteuid() == 0
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # linux/capability.h, VFS_CAP_REVISION_2, bind service


def pieces(data: bytes, length: int):
    stream = io.BytesIO(data)
    return lambda: stream.read(length)


def unpack(where: Path, *layers: bytes, piece: int = 1 << 20) -> Unpacker:
    where.mkdir(exist_ok=True)
    root = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    unpacker = Unpacker(root, Limits())
    try:
        for data in layers:
            unpacker.apply(TarReader(pieces(data, piece)))
        unpacker.finish()
    finally:
        unpacker.close()
        os.close(root)
    return unpacker


def names(where: Path) -> list[str]:
    return sorted(str(path.relative_to(where)) for path in where.rglob("*"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "root"


# ------------------------------------------------------------------------------------------------ round trips


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with one of everything that tar knows."""
    top = tmp_path / "source"
    (top / "deep" / "er").mkdir(parents=True)
    (top / "plain").write_bytes(b"hello\n" * 1000)
    (top / "empty").write_bytes(b"")
    (top / "deep" / "er" / "file").write_bytes(os.urandom(100_001))
    os.link(top / "plain", top / "deep" / "same")
    os.symlink("../plain", top / "deep" / "link")
    os.symlink("/nowhere/at/all", top / "dangling")
    os.mkfifo(top / "fifo", 0o620)
    (top / ("n" * 200)).mkdir()
    (top / ("n" * 200) / ("m" * 150)).write_bytes(b"long name")
    os.symlink("t" * 300, top / "long-target")
    (top / "na\udcffme with\nodd bytes").write_bytes(b"x")
    with open(top / "sparse", "wb") as file:
        for at in range(0, 4_000_000, 100_000):
            file.seek(at)
            file.write(b"data")
        file.truncate(5_000_000)
    os.chmod(top / "plain", 0o4751)
    os.chmod(top / "deep", 0o2775)
    os.chmod(top / "deep" / "er", 0o500)
    os.setxattr(top / "plain", "user.colour", b"blue\0green")
    if ROOT:
        os.chown(top / "deep" / "er" / "file", 1234, 4321)
        os.lchown(top / "dangling", 77, 88)
        os.chown(top / "deep", 1, 2)
        os.chmod(top / "deep", 0o2775)
        os.setxattr(top / "empty", "security.capability", CAPABILITY)
    for number, name in enumerate(["plain", "deep/er/file", "deep/er", "sparse", "deep", "fifo"]):
        os.utime(top / name, ns=(0, 1_600_000_000_123_456_789 + number * 1_000_000_007))
    os.utime(top / "dangling", ns=(0, 999_999_999_999), follow_symlinks=False)
    return top


@pytest.mark.parametrize("piece", [512, 700, 1 << 20])
@pytest.mark.parametrize(
    "form",
    [["--format=pax", "--xattrs"], ["--format=gnu"], ["--format=pax", "--xattrs", "--sparse"],
     ["--format=gnu", "--sparse"], ["--format=pax", "--sparse", "--sparse-version=0.0"],
     ["--format=pax", "--sparse", "--sparse-version=0.1"]],
    ids=lambda form: " ".join(form),
)  # fmt: skip
def test_like_gnu_tar(source: Path, out: Path, tmp_path: Path, form: list[str], piece: int) -> None:
    archive, reference = tmp_path / "layer.tar", tmp_path / "reference"
    subprocess.run(["tar", *form, "--xattrs-include=*", "-C", source, "-cf", archive, "."], check=True)
    reference.mkdir()
    subprocess.run(
        [
            "tar",
            "--numeric-owner",
            "--same-permissions",
            "--xattrs",
            "--xattrs-include=*",
            "-C",
            reference,
            "-xf",
            archive,
        ],
        check=True,
    )
    unpack(out, archive.read_bytes(), piece=piece)
    if ROOT:
        assert tree(out) == tree(reference)
    else:
        assert {name: row[3:] for name, row in tree(out).items()} == {
            name: row[3:] for name, row in tree(reference).items()
        }
    if "--sparse" in form:
        assert os.stat(out / "sparse").st_blocks * 512 < 2_000_000


def test_ustar_prefix_names(out: Path) -> None:
    name = "/".join(["d" * 60, "e" * 60, "f" * 60])
    unpack(out, layer(item(name, b"1"), format=tarfile.USTAR_FORMAT))
    assert (out / name).read_bytes() == b"1"


def test_missing_parents_are_made(out: Path) -> None:
    unpack(out, layer(item("a/b/c", b"1")))
    assert stat.S_IMODE(os.stat(out / "a" / "b").st_mode) == 0o755
    assert os.stat(out / "a").st_mtime == 1_700_000_000


# ---------------------------------------------------------------------------------------------------- layers


def test_upper_layer_wins(out: Path) -> None:
    lower = layer(
        folder("d"), item("d/f", b"old"), item("d/kept", b"kept"), symlink("l", "d"), folder("x"), item("x/y", b"1")
    )
    upper = layer(
        folder("d", mode=0o700), item("d/f", b"new", mode=0o600), item("l", b"file now"), item("x", b"no folder")
    )
    unpack(out, lower, upper)
    assert names(out) == ["d", "d/f", "d/kept", "l", "x"]
    assert (out / "d" / "f").read_bytes() == b"new" and (out / "d" / "kept").read_bytes() == b"kept"
    assert (out / "l").read_bytes() == b"file now" and (out / "x").read_bytes() == b"no folder"
    assert stat.S_IMODE(os.stat(out / "d").st_mode) == 0o700


def test_folder_over_file_and_link(out: Path) -> None:
    unpack(out, layer(item("a", b"1"), symlink("b", "elsewhere")), layer(folder("a"), item("a/x", b"2"), folder("b")))
    assert names(out) == ["a", "a/x", "b"]


def test_whiteout_removes_what_is_below(out: Path) -> None:
    lower = layer(item("a/b/c", b"1"), item("a/d", b"2"), item("e", b"3"))
    unpack(out, lower, layer(item("a/.wh.b"), item(".wh.e"), item(".wh.never-there"), item("a/.wh..wh.plnk")))
    assert names(out) == ["a", "a/d"]


def test_whiteout_spares_its_own_layer(out: Path) -> None:
    lower = layer(item("a/old", b"1"))
    unpack(out, lower, layer(item("a/new", b"2"), item(".wh.a")))
    assert names(out) == ["a", "a/new"]


@pytest.mark.parametrize("first", [True, False])
def test_opaque_hides_lower_layers_only(out: Path, first: bool) -> None:
    lower = layer(item("d/a/deep", b"1"), item("d/b", b"2"), item("other", b"3"), item("d/mixed/old", b"4"))
    mark, new = item("d/.wh..wh..opq"), [item("d/a/new", b"5"), item("d/mixed/x/new", b"6")]
    unpack(out, lower, layer(folder("d"), *([mark, *new] if first else [*new, mark])))
    assert names(out) == ["d", "d/a", "d/a/new", "d/mixed", "d/mixed/x", "d/mixed/x/new", "other"]


def test_removed_folder_does_not_leave_its_attributes(out: Path) -> None:
    lower = layer(folder("d", mode=0o711), folder("d/e", mode=0o700))
    unpack(out, lower, layer(item(".wh.d")), layer(item("d/e/f", b"1")))
    assert stat.S_IMODE(os.stat(out / "d").st_mode) == 0o755
    assert stat.S_IMODE(os.stat(out / "d" / "e").st_mode) == 0o755


def test_hard_link_into_lower_layer_and_copy_up(out: Path) -> None:
    unpack(out, layer(item("a", b"1")), layer(hardlink("b", "a")), layer(item("a", b"2")))
    assert (out / "a").read_bytes() == b"2" and (out / "b").read_bytes() == b"1"


def test_many_folders_do_not_exhaust_descriptors(out: Path) -> None:
    items = [item(f"d{number}/f", b"x") for number in range(300)]
    links = [hardlink(f"d{number}/g", f"d{(number * 7 + 150) % 300}/f") for number in range(300)]
    before = len(os.listdir("/proc/self/fd"))
    unpack(out, layer(*items, *links))
    assert len(names(out)) == 900
    assert len(os.listdir("/proc/self/fd")) == before


def test_parent_through_a_link_stays_inside(out: Path) -> None:
    """/lib is a link to usr/lib in most images; layers made without a container's help write to lib/."""
    unpack(out, layer(folder("usr/lib"), symlink("lib", "/usr/lib")), layer(item("lib/x", b"1")))
    assert (out / "usr" / "lib" / "x").read_bytes() == b"1" and (out / "lib").is_symlink()


def test_link_replaced_after_it_was_followed(out: Path) -> None:
    unpack(out, layer(folder("real"), symlink("l", "real"), item("l/a", b"1"), folder("l"), item("l/b", b"2")))
    assert names(out) == ["l", "l/b", "real", "real/a"]


def test_device_nodes_are_listed_not_made(out: Path) -> None:
    null = item("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    disk = item("dev/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o660, gid=6)
    unpacker = unpack(out, layer(null, disk, hardlink("dev/zip", "dev/null")))
    assert names(out) == ["dev"]
    assert unpacker.devices[b"dev/null"] == {"type": "c", "major": 1, "minor": 3, "mode": 0o666, "uid": 0, "gid": 0}
    assert unpacker.devices[b"dev/sda"]["type"] == "b" and b"dev/zip" in unpacker.devices
    assert unpack(out, layer(null), layer(item("dev/.wh.null"))).devices == {}
    assert unpack(out, layer(null), layer(item("dev/null", b"file"))).devices == {}
    assert unpack(out, layer(null), layer(item("dev/.wh..wh..opq"))).devices == {}


# --------------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(
    "items",
    [
        [item("../evil", b"x")],
        [item("a/../../evil", b"x")],
        [item("/../evil", b"x")],
        [folder("..", mode=0o777)],
        [symlink("l", "../.."), item("l/evil", b"x")],
        [symlink("l", "a/../../../outside"), folder("a"), item("l/evil", b"x")],
        [symlink("l", "/outside"), item("l/x/../../evil", b"x")],
        [hardlink("evil", "../outside/secret")],
        [symlink("l", ".."), hardlink("evil", "l/outside/secret")],
        [item(".wh..", b"")],
        [item(".wh...", b"")],
        [item(".wh.", b"")],
        [symlink("l", "../outside"), item("l/.wh.secret")],
        [symlink("l", "../outside"), item("l/.wh..wh..opq")],
        [symlink("a", "b"), symlink("b", "a"), item("a/x", b"x")],
        [item("f", b"x"), item("f/g", b"x")],
        [hardlink("f", "f")],
        [hardlink("f", "missing")],
        [folder("d"), hardlink("f", "d")],
        [symlink("l", "")],
        [item("n" * 256, b"x")],
        [item("/".join("d" for _ in range(400)) + "/f", b"x")],
        [item(".", b"x")],
        [item("x", b"", type=b"?")],
    ],
)
def test_hostile_entries_are_refused_and_touch_nothing(tmp_path: Path, items: list) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    before = tree(outside)
    descriptors = len(os.listdir("/proc/self/fd"))
    lower = layer(item("first", b"1"))
    with pytest.raises(ImageFault):
        unpack(tmp_path / "root", lower, layer(*items))
    assert tree(outside) == before
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert os.umask(0o022) in (0o022, 0o077) and os.umask(0o022) == 0o022


@pytest.mark.parametrize("name", ["/etc/passwd", "//etc/passwd", "./etc//passwd", "etc/./passwd"])
def test_absolute_names_are_below_the_root(out: Path, name: str) -> None:
    unpack(out, layer(item(name, b"ours")))
    assert names(out) == ["etc", "etc/passwd"]


def test_absolute_link_is_the_images_own(out: Path) -> None:
    """The host's /etc is not what a link to /etc means."""
    unpack(
        out,
        layer(folder("etc"), symlink("l", "/etc"), item("l/kvmsentry-test", b"x"), hardlink("h", "/l/kvmsentry-test")),
    )
    assert (out / "etc" / "kvmsentry-test").exists() and (out / "h").read_bytes() == b"x"
    assert not os.path.exists("/etc/kvmsentry-test")


def test_link_in_the_way_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"safe")
    unpack(tmp_path / "root", layer(symlink("f", str(target)), item("f", b"evil"), symlink("g", "/"), folder("g")))
    assert target.read_bytes() == b"safe" and (tmp_path / "root" / "f").read_bytes() == b"evil"
    assert (tmp_path / "root" / "g").is_dir() and not (tmp_path / "root" / "g").is_symlink()


def test_duplicates_the_last_one_counts(out: Path) -> None:
    unpack(out, layer(item("f", b"1", mode=0o4755), item("f", b"22"), folder("d"), folder("d", mode=0o700)))
    assert (out / "f").read_bytes() == b"22" and stat.S_IMODE(os.stat(out / "f").st_mode) == 0o644


def test_limits(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSENTRY_MAX_IMAGE_ENTRIES", "3")
    with pytest.raises(ImageFault, match="more than 3 files"):
        unpack(out, layer(*(item(f"f{number}") for number in range(4))))
    monkeypatch.setenv("KVMSENTRY_MAX_IMAGE_BYTES", "1000")
    with pytest.raises(ImageFault, match="more than 1000 bytes"):
        unpack(out, layer(item("a", bytes(600))), layer(item("b", bytes(600))))


def test_sparse_file_of_absurd_length(out: Path) -> None:
    headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(1 << 60),
    }
    with pytest.raises(ImageFault):
        unpack(out, layer(item("f", b"", pax_headers=headers)))


@pytest.mark.skipif(not ROOT, reason="drops from root to an ordinary user")
def test_ordinary_user_keeps_owners_aside(tmp_path: Path) -> None:
    """In a child that is nobody: what cannot be set is remembered, what is unreadable by its mode stays readable."""
    home = tmp_path / "home"
    home.mkdir()
    for path in [tmp_path, *tmp_path.parents][:3]:
        os.chmod(path, 0o755)
    os.chown(home, 65534, 65534)
    capability = {"SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1")}
    data = layer(
        folder("d", mode=0o500, uid=3), item("d/shadow", b"s", mode=0, uid=5, gid=42), item("su", b"", mode=0o4755),
        item("plain", b"x"), hardlink("again", "d/shadow"), symlink("l", "plain", uid=9),
        item("cap", b"", pax_headers=capability),
    )  # fmt: skip
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            owners = unpack(home / "root", data).owners
            assert owners[b"d"] == {"uid": 3, "gid": 0, "mode": 0o500}
            assert owners[b"d/shadow"] == owners[b"again"] == {"uid": 5, "gid": 42, "mode": 0}
            assert owners[b"su"]["mode"] == 0o4755 and owners[b"l"]["uid"] == 9 and b"plain" not in owners
            assert owners[b"cap"]["xattrs"]["security.capability"] == CAPABILITY.hex()
            assert (home / "root" / "d" / "shadow").read_bytes() == b"s"
            from kvmsentry.image.beneath import remove_tree

            os.chmod(home / "root" / "d", 0)
            fd = os.open(home, os.O_RDONLY)
            remove_tree(fd, b"root")
            assert os.listdir(home) == []
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
