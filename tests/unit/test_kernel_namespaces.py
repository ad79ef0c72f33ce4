"""What namespaces decide without a running kernel: maps, capabilities between user namespaces, pids."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from kvmsentry.errors import Errno
from kvmsentry.kernel import cap, pidns, userns
from kvmsentry.kernel.task import Credentials
from kvmsentry.kernel.userns import ROOT, UserNamespace


def fails(number: int, function: Any, *arguments: Any) -> None:
    with pytest.raises(Errno) as caught:
        function(*arguments)
    assert caught.value.errno == number


def made(parent: UserNamespace = ROOT, owner: int = 1000) -> tuple[UserNamespace, Credentials]:
    ns = UserNamespace(parent, owner, owner)
    old = Credentials(owner, owner)
    old.user_ns = parent
    return ns, userns.entered(old, ns)


def test_capabilities_count_below_and_not_above() -> None:
    ns, creds = made()
    inner, inner_creds = made(ns)
    outsider, owner, root = Credentials(2000), Credentials(1000), Credentials(0)
    assert userns.capable(creds, ns, cap.SYS_ADMIN) and userns.capable(creds, inner, cap.SYS_ADMIN)
    assert not userns.capable(creds, ROOT, cap.SYS_ADMIN) and not creds.capable(cap.SYS_ADMIN)
    assert creds.holds(cap.SYS_ADMIN)
    assert not userns.capable(inner_creds, ns, cap.SYS_ADMIN)
    assert userns.capable(owner, ns, cap.SYS_ADMIN) and userns.capable(owner, inner, cap.SYS_ADMIN)
    assert not userns.capable(outsider, ns, cap.SYS_ADMIN) and userns.capable(root, inner, cap.SYS_ADMIN)


def test_maps_translate_both_ways_through_two_levels() -> None:
    ns, creds = made()
    writer = SimpleNamespace(creds=Credentials(0))
    userns.write_map(writer, writer.creds, ns, "uid_map", b"0 100000 1000\n5000 1000 1\n")
    assert userns.kuid(creds, 7) == 100007 and userns.kuid(creds, 5000) == 1000
    assert userns.shown_uid(ns, 100999) == 999 and userns.shown_uid(ns, 101000) == userns.OVERFLOW
    fails(errno.EINVAL, userns.kuid, creds, 1000)
    inner, inner_creds = made(ns, 100000)
    above = SimpleNamespace(creds=creds.replace(euid=100000))
    fails(errno.EPERM, userns.write_map, above, above.creds, inner, "uid_map", b"0 990 20\n")  # beyond the parent's
    userns.write_map(above, above.creds, inner, "uid_map", b"0 10 5\n")
    assert userns.kuid(inner_creds, 4) == 100014
    assert userns.map_text(inner_creds, inner, inner.uid_map, "uid_map").split() == ["0", "10", "5"]
    assert userns.map_text(Credentials(), inner, inner.uid_map, "uid_map").split() == ["0", "100010", "5"]


@pytest.mark.parametrize(
    "text", [b"", b"0 0", b"0 0 0", b"a 0 1", b"-1 0 1", b"0 0 1 1", b"0 0 2\n1 5 1", b"0 5 2\n7 6 1",
             b"4294967295 0 1", b"0 4294967290 9", b"0 0 99999999999", b"\n0 0 1"]
)  # fmt: skip
def test_malformed_maps(text: bytes) -> None:
    ns, _ = made()
    writer = SimpleNamespace(creds=Credentials(0))
    fails(errno.EINVAL, userns.write_map, writer, writer.creds, ns, "uid_map", text)
    assert ns.uid_map is None


def test_a_descriptor_passed_to_root_does_not_lend_its_rights() -> None:
    ns, _ = made()
    privileged, opener = SimpleNamespace(creds=Credentials(0)), Credentials(2000)
    fails(errno.EPERM, userns.write_map, privileged, opener, ns, "uid_map", b"0 0 1\n")


def test_numbers_of_a_pid_namespace() -> None:
    kernel = SimpleNamespace(tasks={}, processes={})
    first = pidns.first(kernel)  # type: ignore[arg-type]
    inner = pidns.PidNamespace(first, ROOT)
    innermost = pidns.PidNamespace(inner, ROOT)
    assert first.sees(innermost) and inner.sees(innermost) and not innermost.sees(inner)
    assert [inner.next_number() for _ in range(3)] == [1, 2, 3]
    fails(errno.EEXIST, lambda: (inner.tasks.update({9: None}), inner.next_number(9)))
    inner.last_pid = pidns.PID_MAX - 1
    assert inner.next_number() == pidns.RESERVED_PIDS
    inner.closed = True
    fails(errno.ENOMEM, inner.next_number)
