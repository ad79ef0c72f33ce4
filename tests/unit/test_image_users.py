"""Who a user is, by the image's own files, and never by the host's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmsentry.errors import UserError
from kvmsentry.image import resolve_user

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# comment:x:9:9::/:
broken line
web:x:33:44:web:/var/www:/bin/false
homeless:x:50:50:::/bin/sh
4242:x:7:8::/numeric:
web2:x:33:99::/second:
"""
GROUP = "root:x:0:\nweb:x:44:\nextra:x:100:root,web\nmore:x:101:web\nbig:x:99999999999:web\nshort\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "root"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "passwd").write_text(PASSWD)
    (top / "etc" / "group").write_text(GROUP)
    return top


@pytest.mark.parametrize(
    "spec, user",
    [
        ("", (0, 0, [100], "/root")),
        ("root", (0, 0, [100], "/root")),
        ("web", (33, 44, [100, 101], "/var/www")),
        ("33", (33, 44, [100, 101], "/var/www")),
        ("web:root", (33, 0, [], "/var/www")),
        ("web:7", (33, 7, [], "/var/www")),
        ("homeless", (50, 50, [], "/")),
        ("1000", (1000, 0, [], "/")),
        ("1000:1000", (1000, 1000, [], "/")),
        ("1000:more", (1000, 101, [], "/")),
        ("4242", (4242, 0, [], "/")),
        (":extra", (0, 100, [], "/root")),
    ],
)
def test_found(root: Path, spec: str, user: tuple) -> None:
    assert tuple(resolve_user(str(root), spec)) == user


@pytest.mark.parametrize(
    "spec", ["nobody", "web:nogroup", "web:", "2147483648", "-1", "1:2147483648", "99999999999", "ü"]
)
def test_not_found(root: Path, spec: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_user(str(root), spec)
    assert caught.value.status == 125


def test_image_without_files(tmp_path: Path) -> None:
    assert tuple(resolve_user(str(tmp_path), "")) == (0, 0, [], "/")
    assert tuple(resolve_user(str(tmp_path), "5:6")) == (5, 6, [], "/")
    with pytest.raises(UserError, match="not in the image's /etc/passwd"):
        resolve_user(str(tmp_path), "root")


def test_links_stay_in_the_image(root: Path) -> None:
    """An image whose /etc/passwd is a link reads its own file; one that climbs or loops is refused."""
    secret = root.parent / "secret"
    secret.write_text("spy:x:1:1::/:\n")
    (root / "real").write_text("own:x:5:5::/own:\n")
    path = root / "etc" / "passwd"
    for target in ("/real", "../real"):
        path.unlink()
        os.symlink(target, path)
        assert resolve_user(str(root), "own").uid == 5
    for target in ("../../secret", "passwd"):
        path.unlink()
        os.symlink(target, path)
        with pytest.raises(UserError, match="the image's /etc/passwd"):
            resolve_user(str(root), "spy")
    path.unlink()
    os.symlink(str(secret), path)  # absolute: below the image's root there is no such file
    with pytest.raises(UserError, match="not in the image"):
        resolve_user(str(root), "spy")


def test_odd_files(root: Path) -> None:
    path = root / "etc" / "passwd"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="no regular file"):
        resolve_user(str(root), "root")
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="/etc/passwd"):
        resolve_user(str(root), "root")
    path.unlink()
    path.write_bytes(b"b\xffd:x:5:6::/h\xff:\n\0\0:::::\n")
    assert resolve_user(str(root), "b\udcffd").home == "/h\udcff"
