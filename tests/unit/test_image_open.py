"""Archives to images: both layouts, every compression, every way to be broken, and a census afterwards."""

from __future__ import annotations

import fcntl
import gzip
import json
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest
from image_factory import (
    OciLayout,
    census,
    config,
    docker_archive,
    docker_members,
    folder,
    item,
    layer,
    packed,
    sha,
    symlink,
    write_tar,
)

from kvmsentry.errors import UserError
from kvmsentry.image import list_images, open_image, remove_image, store
from kvmsentry.image.store import Image

LAYERS = [
    layer(folder("etc"), item("etc/name", b"lower"), item("gone", b"1")),
    layer(item(".wh.gone"), item("top", b"2")),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own; afterwards no descriptor is open but images' holds, and nothing half-made lies about."""
    path = tmp_path / "store"
    monkeypatch.setenv("KVMSENTRY_STORE", str(path))
    monkeypatch.setattr(store, "_FRESH_NS", 0)
    return path


def close(image: Image) -> Image:
    os.close(image.hold)
    return image


def files(image: Image) -> list[str]:
    return sorted(os.path.relpath(os.path.join(where, name), image.rootfs)
                  for where, folders, names in os.walk(image.rootfs) for name in folders + names)  # fmt: skip


def refused(path: Path, ref: str | None = None) -> str:
    """The message that opening `path` fails with; nothing may be left behind."""
    home = Path(os.environ["KVMSENTRY_STORE"])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError) as caught:
        open_image(str(path), ref)
    assert caught.value.status == 125
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    descriptors, left = census(home)
    assert descriptors == before and left == []
    assert not list(home.glob("1/rootfs/*")) and not list(home.glob("1/images/*")) and not list(home.glob("1/seen/*"))
    return message.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------------ whole


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("layout", ["docker", "oci", "directory"])
def test_opens(tmp_path: Path, home: Path, layout: str, compression: str) -> None:
    path = tmp_path / "image"
    if layout == "docker":
        docker_archive(path, LAYERS, compression=compression)
    else:
        oci = OciLayout()
        oci.add(oci.manifest(LAYERS, compression), tag="test:latest")
        oci.write(path) if layout == "oci" else oci.write_directory(path)
    seen: list[tuple[int, int]] = []
    before = len(os.listdir("/proc/self/fd"))
    image = close(open_image(str(path), progress=lambda done, total: seen.append((done, total))))
    assert files(image) == ["etc", "etc/name", "top"]
    assert image.id == sha(config(LAYERS)) and image.tags == ["test:latest"]
    assert image.config.cmd == ["/bin/true"] and image.size == 7
    assert seen and seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)
    assert census(home) == (before, [])
    again = close(open_image(str(path), progress=lambda done, total: pytest.fail("unpacked twice")))
    assert (again.id, again.rootfs, again.config) == (image.id, image.rootfs, image.config)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_archive_packed_as_a_whole(tmp_path: Path, compression: str) -> None:
    plain = docker_archive(tmp_path / "plain.tar", LAYERS).read_bytes()
    path = tmp_path / "image.tar.packed"
    path.write_bytes(packed(plain, compression))
    assert "top" in files(close(open_image(str(path))))


def test_old_docker_save_links_layers(tmp_path: Path) -> None:
    first, second = LAYERS
    document = config([first, second, first])
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"]}]
    path = tmp_path / "image.tar"
    path.write_bytes(
        layer(
            folder("a"),
            item("a/layer.tar", first),
            item("b/layer.tar", second),
            symlink("c/layer.tar", "../a/layer.tar"),
            item("c.json", document),
            item("manifest.json", json.dumps(manifest).encode()),
        )  # fmt: skip
    )
    image = close(open_image(str(path)))
    assert files(image) == ["etc", "etc/name", "gone", "top"] and image.tags == []


def test_newer_docker_writes_both_layouts(tmp_path: Path) -> None:
    """Docker 25 and later: an OCI layout with a manifest.json that points into its blobs."""
    oci = OciLayout()
    oci.add(oci.manifest(LAYERS), tag="latest")
    blobs = [f"blobs/sha256/{sha(data)}" for data in (config(LAYERS), *LAYERS)]
    manifest = [{"Config": blobs[0], "RepoTags": ["test:latest"], "Layers": blobs[1:]}]
    oci.members["manifest.json"] = json.dumps(manifest).encode()
    image = close(open_image(str(oci.write(tmp_path / "a"))))
    assert (image.id, image.tags, len(files(image))) == (sha(config(LAYERS)), ["test:latest"], 3)
    remove_image(image.id)
    oci.members[blobs[1]] = packed(LAYERS[0], "gzip")
    assert "layer 1: wrong digest" in refused(oci.write(tmp_path / "b"))


def test_second_open_reads_nothing_and_a_change_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = docker_archive(tmp_path / "image.tar", LAYERS)
    first = close(open_image(str(path)))
    with monkeypatch.context() as patch:
        patch.setattr(store._Store, "unpack", lambda *args: pytest.fail("read again"))
        assert close(open_image(str(path))).id == first.id
    docker_archive(path, LAYERS[:1])
    assert close(open_image(str(path))).id != first.id


def test_copy_of_an_archive_is_not_unpacked_again(tmp_path: Path) -> None:
    first = close(open_image(str(docker_archive(tmp_path / "a.tar", LAYERS))))
    docker_archive(tmp_path / "b.tar", LAYERS, tags=("other:1",))
    second = close(open_image(str(tmp_path / "b.tar"), progress=lambda done, total: pytest.fail("unpacked twice")))
    assert second.rootfs == first.rootfs and set(second.tags) == {"other:1", "test:latest"}


def test_changed_while_fresh_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(store, "_FRESH_NS", 1 << 62)
    close(open_image(str(docker_archive(tmp_path / "a.tar", LAYERS))))
    assert list(home.glob("1/seen/*")) == []


# ----------------------------------------------------------------------------------------------------- choice


def several(path: Path) -> Path:
    members: dict[str, bytes] = {}
    manifests = []
    for tags, layers in ((("localhost/one:latest", "one:old"), LAYERS[:1]), (("docker.io/library/two:2",), LAYERS)):
        part = docker_members(list(layers), tags=tags)
        manifests += json.loads(part.pop("manifest.json"))
        members |= part
    return write_tar(path, {**members, "manifest.json": json.dumps(manifests).encode()})


@pytest.mark.parametrize("ref", ["localhost/one:latest", "one", "one:latest", "one:old", sha(config(LAYERS[:1]))[:12]])
def test_a_tag_chooses(tmp_path: Path, ref: str) -> None:
    assert files(close(open_image(str(several(tmp_path / "a.tar")), ref))) == ["etc", "etc/name", "gone"]


def test_several_images_need_a_choice(tmp_path: Path) -> None:
    path = several(tmp_path / "a.tar")
    assert refused(path) == (
        "holds several images, choose one with --image-ref: localhost/one:latest, docker.io/library/two:2"
    )
    assert "holds no image three, only" in refused(path, "three")
    assert close(open_image(str(path), "two:2")).tags == ["docker.io/library/two:2"]


def test_index_gives_the_platform(tmp_path: Path) -> None:
    oci = OciLayout()
    arm = oci.manifest(LAYERS[:1], document=config(LAYERS[:1], architecture="arm64"))
    amd, attestation = oci.manifest(LAYERS), oci.blob(b"{}", "manifest.v1+json")
    inner = [
        {**arm, "platform": {"os": "linux", "architecture": "arm64"}},
        {**attestation, "platform": {"os": "unknown", "architecture": "unknown"}},
        {**amd, "platform": {"os": "linux", "architecture": "amd64"}},
    ]
    oci.add(oci.index(inner), tag="multi")
    assert close(open_image(str(oci.write(tmp_path / "nested.tar")))).id == sha(config(LAYERS))
    oci.manifests = inner
    assert close(open_image(str(oci.write(tmp_path / "flat.tar")))).id == sha(config(LAYERS))
    remove_image(sha(config(LAYERS)))
    oci.manifests = []
    oci.add(oci.index(inner[:1]), tag="multi")
    assert refused(oci.write(tmp_path / "arm.tar")) == "has no image for linux/amd64, only for linux/arm64"


def test_oci_choice_by_name_and_id(tmp_path: Path) -> None:
    oci = OciLayout()
    oci.add(oci.manifest(LAYERS[:1]), tag="one")
    oci.add(oci.manifest(LAYERS), tag="two")
    path = oci.write(tmp_path / "a.tar")
    assert "several images" in refused(path)
    assert close(open_image(str(path), "two")).id == sha(config(LAYERS))
    assert close(open_image(str(path), sha(config(LAYERS[:1]))[:10])).tags == ["one"]


# ----------------------------------------------------------------------------------------------------- broken


def test_no_such_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.tar") == "No such file or directory"


@pytest.mark.parametrize("data", [b"", b"x", b"no tar at all\n" * 1000, bytes(10240), b"\x7fELF" + bytes(600)])
def test_no_tar(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(data)
    assert refused(path) == "is no tar archive"


def test_other_things_than_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refused(tmp_path / "fifo") == "is neither a file nor a directory"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith("holds no image")
    assert "packed with xz" in refused(_written(tmp_path / "x", b"\xfd7zXZ\0" + bytes(600)))
    assert refused(_written(tmp_path / "y", gzip.compress(b"text"))) == "is no tar archive"
    assert refused(write_tar(tmp_path / "z", {"README": b"hello"})).startswith("holds no image")


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("layout", ["docker", "oci"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_layer(tmp_path: Path, layout: str, compression: str, keep: float) -> None:
    plain = layer(item("a", os.urandom(5000)), item("b", os.urandom(5000)))
    whole = packed(plain, compression)
    short = whole[: int(len(whole) * keep)]
    members = docker_members([plain], compression)
    if layout == "docker":
        path = write_tar(tmp_path / "a", {name: short if data == whole else data for name, data in members.items()})
    else:
        oci = OciLayout()
        oci.add(oci.manifest([plain], compression))
        oci.members = {name: short if data == whole else data for name, data in oci.members.items()}
        path = oci.write(tmp_path / "a")
    message = refused(path)
    assert message.startswith("layer 1"), message
    assert "truncated" in message or "bytes long" in message or "wrong diff_id" in message


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_corrupt_layer(tmp_path: Path, compression: str) -> None:
    plain = layer(item("a", os.urandom(5000)))
    whole = packed(plain, compression)
    for at in (600, len(whole) // 2):
        damaged = whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]
        members = docker_members([plain], compression)
        path = write_tar(tmp_path / "a", {name: damaged if data == whole else data for name, data in members.items()})
        assert refused(path).startswith("layer 1: ")


def test_damaged_header(tmp_path: Path) -> None:
    plain = bytearray(layer(item("a", b"1"), item("b", b"2")))
    plain[1024 + 5] ^= 1
    assert "damaged tar header at byte 1024" in refused(docker_archive(tmp_path / "a", [bytes(plain)]))


def test_truncated_archive(tmp_path: Path) -> None:
    data = docker_archive(tmp_path / "a", [layer(item("f", os.urandom(50_000)))]).read_bytes()
    for keep in (20_000, len(data) - 10_240 - 700, 300):
        path = _written(tmp_path / "b", data[:keep])
        assert refused(path).startswith(("truncated", "holds no image", "is no tar archive")), keep


def test_wrong_digests(tmp_path: Path) -> None:
    members = docker_members(LAYERS)
    name = f"{sha(config(LAYERS))}.json"
    changed = {**members, name: members[name].replace(b"/bin/true", b"/bin/fals")}
    assert "wrong digest" in refused(write_tar(tmp_path / "config.tar", changed))
    other = layer(item("evil", b"1"))
    changed = {**members, f"{sha(LAYERS[1])}.tar": other}
    message = refused(write_tar(tmp_path / "layer.tar", changed))
    assert message == f"layer 2: wrong diff_id sha256:{sha(other)}, not sha256:{sha(LAYERS[1])}"


@pytest.mark.parametrize("kind", ["manifest", "config", "layer"])
def test_wrong_digests_oci(tmp_path: Path, kind: str) -> None:
    oci = OciLayout()
    oci.add(oci.manifest(LAYERS, "gzip"))
    wanted = {"manifest": b"schemaVersion", "config": b"diff_ids", "layer": b"\x1f\x8b"}[kind]
    name, data = next(
        (name, data) for name, data in oci.members.items() if wanted in data and b"oci-layout" not in data
    )
    # the gzip header's OS byte: the layer unpacks to the same bytes, only its packed digest is another
    oci.members[name] = data[:9] + b"\x07" + data[10:] if kind == "layer" else data.replace(b'": ', b'":  ', 1)
    message = refused(oci.write(tmp_path / "a"))
    assert "wrong digest" in message or "bytes long" in message
    assert kind in message


def test_missing_parts(tmp_path: Path) -> None:
    members = docker_members(LAYERS)
    document, first = f"{sha(config(LAYERS))}.json", f"{sha(LAYERS[0])}.tar"
    without = {name: data for name, data in members.items() if name != document}
    assert refused(write_tar(tmp_path / "a", without)) == f"the config {document} is missing"
    without = {name: data for name, data in members.items() if name != first}
    assert refused(write_tar(tmp_path / "b", without)) == f"layer 1 ({first}) is missing"
    oci = OciLayout()
    oci.add(oci.manifest(LAYERS))
    for name in [name for name in oci.members if name.startswith("blobs")]:
        data = oci.members.pop(name)
        assert "is missing" in refused(oci.write(tmp_path / "c"))
        oci.members[name] = data


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architecture": "arm64"}, "is for the architecture 'arm64', not amd64"),
        ({"architecture": None}, "is for the architecture '', not amd64"),
        ({"os": "windows"}, "is for the operating system 'windows', not linux"),
        ({"architecture": 7}, "config.architecture is a number, not a string"),
        ({"config": []}, "config.config is a list, not an object"),
        ({"config": {"Env": "A=b"}}, "config.config.Env is a string, not a list of strings"),
        ({"config": {"Env": ["=b"]}}, "config.config.Env: '=b' is no NAME=value"),
        ({"config": {"Cmd": [1]}}, "config.config.Cmd holds a number, not only strings"),
        ({"config": {"Entrypoint": {"a": 1}}}, "config.config.Entrypoint is an object, not a list of strings"),
        ({"config": {"User": 0}}, "config.config.User is a number, not a string"),
        ({"config": {"WorkingDir": ["/"]}}, "config.config.WorkingDir is a list, not a string"),
        ({"config": {"StopSignal": True}}, "config.config.StopSignal is a boolean, not a string"),
        ({"config": {"Volumes": ["/data"]}}, "config.config.Volumes is a list, not an object"),
        ({"config": {"ExposedPorts": "80"}}, "config.config.ExposedPorts is a string, not an object"),
        ({"config": {"Labels": {"a": 1}}}, "config.config.Labels: 'a' is a number, not a string"),
        ({"rootfs": {"diff_ids": ["sha256:0"]}}, "config.rootfs.diff_ids: 'sha256:0' is no sha256 digest"),
        ({"rootfs": {"diff_ids": []}}, "manifest.json has 2 layers, the config 0"),
    ],
)
def test_config_faults_name_the_field(tmp_path: Path, change: dict, words: str) -> None:
    document = json.dumps({**json.loads(config(LAYERS)), **change}).encode()
    assert refused(docker_archive(tmp_path / "a", LAYERS, document=document)) == words


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{}", b"[]", b"[1]", b"[[", b'[{"Config": 1}]', b'[{"Config": "c", "Layers": "x"}]', b"\xff" * 10,
     b"[" * 100_000, b'[{"Config": "\\ud800"}]', b'[{"Config": "a\\u0000b"}]',
     b'[{"Config": "../../etc/passwd", "Layers": []}]'],
)  # fmt: skip
def test_manifest_faults(tmp_path: Path, manifest: bytes) -> None:
    refused(write_tar(tmp_path / "a", {"manifest.json": manifest}))
    refused(write_tar(tmp_path / "b", {"index.json": manifest}))
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "manifest.json").write_bytes(manifest)
    refused(tmp_path / "directory")


def test_config_fields(tmp_path: Path) -> None:
    inner = {
        "Entrypoint": ["/init", "--"], "Cmd": None, "Env": ["A=1", "B="], "WorkingDir": "/w", "User": "u:g",
        "StopSignal": "SIGINT", "Volumes": {"/data": {}}, "ExposedPorts": {"80/tcp": {}}, "Labels": {"k": "v"},
    }  # fmt: skip
    given = close(open_image(str(docker_archive(tmp_path / "a", LAYERS, document=config(LAYERS, inner))))).config
    assert (given.entrypoint, given.cmd, given.env, given.working_dir) == (["/init", "--"], [], ["A=1", "B="], "/w")
    assert (given.user, given.stop_signal, given.volumes) == ("u:g", "SIGINT", ["/data"])
    assert (given.exposed_ports, given.labels, given.architecture, given.os) == (
        ["80/tcp"],
        {"k": "v"},
        "amd64",
        "linux",
    )


def test_path_that_climbs(tmp_path: Path) -> None:
    lower = layer(symlink("l", "../.."))
    assert refused(docker_archive(tmp_path / "a", [layer(item("../x", b"1"))])) == (
        "layer 1: the path ../x leads out of the root filesystem"
    )
    assert refused(docker_archive(tmp_path / "b", [lower, layer(item("l/x", b"1"))])) == (
        "layer 2: the path l/x leads out of the root filesystem"
    )


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    path = docker_archive(tmp_path / "a", [layer(item("zeros", bytes(20_000_000)))], compression=compression)
    monkeypatch.setenv("KVMSENTRY_MAX_IMAGE_BYTES", "1000000")
    assert "unpacks to more than 1000000 bytes" in refused(path)
    monkeypatch.delenv("KVMSENTRY_MAX_IMAGE_BYTES")
    monkeypatch.setenv("KVMSENTRY_MAX_IMAGE_RATIO", "10")
    monkeypatch.setattr("kvmsentry.image.faults.Limits.RATIO_FREE", 1000)
    assert "unpacks to more than 10 times its size" in refused(path)
    monkeypatch.setenv("KVMSENTRY_MAX_IMAGE_RATIO", "many")
    with pytest.raises(UserError, match="KVMSENTRY_MAX_IMAGE_RATIO=many"):
        open_image(str(path))


def test_device_nodes_are_recorded(tmp_path: Path) -> None:
    node = item("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    image = close(open_image(str(docker_archive(tmp_path / "a", [layer(node)]))))
    assert [(device["path"], device["type"], device["major"]) for device in image.devices] == [("dev/null", "c", 1)]


# ------------------------------------------------------------------------------------------------------ store


def test_list_and_remove(tmp_path: Path, home: Path) -> None:
    held = open_image(str(docker_archive(tmp_path / "a.tar", LAYERS)))
    close(open_image(str(docker_archive(tmp_path / "b.tar", LAYERS[:1], tags=("other:1",)))))
    assert [image.tags for image in list_images()] == [["other:1"], ["test:latest"]]
    with pytest.raises(UserError, match="in use"):
        remove_image("test")
    assert files(held) == ["etc", "etc/name", "top"]
    close(held)
    assert remove_image("test") == held.id
    assert remove_image(list_images()[0].id[:8]) and list_images() == []
    assert not list(home.glob("1/*/*"))
    with pytest.raises(UserError, match="no such image"):
        remove_image("test")
    assert close(open_image(str(tmp_path / "a.tar"))).id == held.id


def test_images_share_files_until_the_last_is_removed(tmp_path: Path) -> None:
    one = close(open_image(str(docker_archive(tmp_path / "a", LAYERS))))
    two = close(open_image(str(docker_archive(tmp_path / "b", LAYERS, document=config(LAYERS, {"Cmd": ["x"]})))))
    assert one.rootfs == two.rootfs and one.id != two.id
    remove_image(one.id)
    assert files(two) == ["etc", "etc/name", "top"]
    remove_image(two.id)
    assert not os.path.exists(two.rootfs)


def test_store_is_private(tmp_path: Path, home: Path) -> None:
    close(open_image(str(docker_archive(tmp_path / "a", LAYERS))))
    assert home.stat().st_mode & 0o777 == 0o700


def test_store_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMSENTRY_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert store.store_path() == "/data/kvmsentry"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert store.store_path() == "/var/lib/kvmsentry"


def _open_in_child(path: str, go, results) -> None:
    go.wait()
    calls: list[int] = []
    image = open_image(path, progress=lambda done, total: calls.append(done))
    results.put((image.id, bool(calls), len(files(image))))


def test_two_at_once_unpack_once(tmp_path: Path, home: Path) -> None:
    data = [layer(*(item(f"d{number % 50}/f{number}", os.urandom(100)) for number in range(600)))]
    path = docker_archive(tmp_path / "a.tar", data)
    context = multiprocessing.get_context("fork")
    go, results = context.Event(), context.SimpleQueue()
    children = [context.Process(target=_open_in_child, args=(str(path), go, results)) for _ in range(4)]
    for child in children:
        child.start()
    go.set()
    answers = [results.get() for _ in children]
    for child in children:
        child.join()
    assert len({(image_id, count) for image_id, _, count in answers}) == 1 and answers[0][2] == 650
    assert sum(unpacked for _, unpacked, _ in answers) == 1
    assert census(home)[1] == [] and len(list(home.glob("1/rootfs/*"))) == 1


def test_interrupted_leaves_nothing(tmp_path: Path, home: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    path = docker_archive(tmp_path / "a.tar", [layer(*(item(f"f{number}") for number in range(1000)))])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        open_image(str(path), progress=stop)
    assert census(home) == (before, []) and not list(home.glob("1/rootfs/*"))
    assert len(files(close(open_image(str(path))))) == 1000


def test_waiter_takes_over_from_one_that_fails(tmp_path: Path, home: Path) -> None:
    """S2: the second waits for the lock of the very directory that the first then removes."""
    base = store._Store(str(home))
    base._prepare()
    chain = "c" * 64
    reader, writer = os.pipe()
    child = os.fork()  # before the lock is taken: a descriptor that was inherited would hold it, too
    if child == 0:
        status = 1
        try:
            os.read(reader, 1)
            with base._building(chain) as where:
                assert where is not None
                Path(where, "meta.json").write_text("{}")
            status = 0
        finally:
            os._exit(status)
    with pytest.raises(RuntimeError), base._building(chain):
        os.write(writer, b"x")
        while f"-> FLOCK  ADVISORY  WRITE {child} " not in Path("/proc/locks").read_text():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        raise RuntimeError
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(reader)
    os.close(writer)
    assert (home / "1" / "rootfs" / chain / "meta.json").exists() and census(home)[1] == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path, home: Path) -> None:
    data = [layer(*(item(f"f{number}") for number in range(1000)))]
    path = docker_archive(tmp_path / "a.tar", data)
    child = os.fork()
    if child == 0:
        open_image(str(path), progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert census(home)[1] != []
    close(open_image(str(docker_archive(tmp_path / "b.tar", LAYERS))))
    assert census(home)[1] == []


def test_a_builder_at_work_is_not_swept(tmp_path: Path, home: Path) -> None:
    base = store._Store(str(home))
    base._prepare()
    with base._building("d" * 64) as where:
        assert where is not None
        close(open_image(str(docker_archive(tmp_path / "b.tar", LAYERS))))
        assert os.path.isdir(where)
        Path(where, "meta.json").write_text("{}")
    with open(home / "1" / "rootfs" / ("d" * 64) / "meta.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_start_of_a_known_image_imports_little(tmp_path: Path) -> None:
    """What makes a second `run` quick: no tar, hashing or compression code is loaded for it."""
    import subprocess
    import sys

    path = docker_archive(tmp_path / "a.tar", LAYERS)
    os.utime(path, (time.time() - 10,) * 2)
    close(open_image(str(path)))
    code = (
        "import sys; from kvmsentry.image import open_image; open_image(sys.argv[1]);"
        "print(*(m for m in sys.modules if m in ('hashlib', 'zstandard', 'tarfile', 'threading', 'click',"
        " 'kvmsentry.image.tar', 'kvmsentry.image.unpack')))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert result.stdout.split() == []
