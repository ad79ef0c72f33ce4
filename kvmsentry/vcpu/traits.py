"""What this host's KVM does, asked once a boot and kept.

The answers choose the entry (ring 0 or ring 3) and the way page-table changes are made to hold; see docs on KVM hosts.
They are kept in $XDG_CACHE_HOME/kvmsentry (~/.cache by default) under the boot's id, and asked again when that file
cannot be read or written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from typing import Any

from kvmsentry.errors import HostError

from ._kvm import ffi, lib

VERSION = 5  # of the answers: raise it when a question changes
MEND_NO_DEVICE = (
    "load KVM with 'modprobe kvm_amd' or 'modprobe kvm_intel'; in a virtual machine, enable nested virtualisation"
)
MEND_PERMISSION = "add yourself to group kvm with 'usermod -aG kvm $USER' and log in again, or chmod or chown /dev/kvm"
MEND_OLD = "kvmsentry needs a processor of 2012 or later, and a host that passes its features on"
MEND_BUSY = "another hypervisor holds the processor's virtualisation: stop VirtualBox or VMware, or unload its module"


def open_kvm(path: str = "/dev/kvm") -> int:
    """A descriptor of /dev/kvm; HostError that says how to mend it when the host refuses."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(f"open {path}", error.errno or errno.EIO) from None


def refusal(operation: str, error: int) -> HostError:
    """The HostError of a refused KVM operation, with what helps."""
    mend = ""
    if error in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        mend = MEND_NO_DEVICE
    elif error in (errno.EACCES, errno.EPERM):
        mend = MEND_PERMISSION
    elif error == errno.EBUSY:
        mend = MEND_BUSY
    elif error == errno.EMFILE:
        mend = "raise the limit of open files: ulimit -n"
    elif error == errno.ENOMEM:
        mend = "the host is out of memory, or 'ulimit -v' is set"
    return HostError(operation, error, mend)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _cache_path() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "kvmsentry", "traits.json")


def probe(kvm: int) -> dict[str, Any]:
    """Asks the host; some milliseconds. HostError when it refuses or lacks something the machine cannot do without."""
    answers = ffi.new("struct ks_traits *")
    rc = lib.ks_probe(kvm, answers)
    if rc < 0:
        operation = ffi.string(answers.failed).decode() if answers.failed else "KVM probe"
        raise refusal(operation, -rc)
    traits: dict[str, Any] = {
        "ring0_native": bool(answers.ring0_native),
        "syscall_ring0": bool(answers.syscall_ring0),
        "sees_outside_writes": bool(answers.sees_outside_writes),
        "sync_regs": answers.sync_regs,
        "immediate_exit": bool(answers.immediate_exit),
        "fsgsbase": bool(answers.fsgsbase),
        "xcr0": answers.xcr0,
        "xsave_size": answers.xsave_size,
        "max_vcpus": answers.max_vcpus,
        "phys_bits": answers.phys_bits,
        "tsc_khz": answers.tsc_khz,
        "virtual": bool(answers.virtual),
        "tsc_is_hosts": bool(answers.tsc_is_hosts),
        "ring0_ns_per_100": answers.ring0_ns100,
    }
    # The ring 0 entry wants both; where SYSCALL stays in ring 3, or ring 0 is emulated, the ring 3 entry serves.
    traits["entry"] = "ring0" if traits["ring0_native"] and traits["syscall_ring0"] else "ring3"
    traits["paging"] = "nested" if traits["sees_outside_writes"] else "shadow"
    if not traits["fsgsbase"]:
        raise HostError("KVM offers no FSGSBASE", 0, MEND_OLD)
    if traits["sync_regs"] & 3 != 3 or not traits["immediate_exit"]:
        raise HostError("KVM lacks KVM_CAP_SYNC_REGS or KVM_CAP_IMMEDIATE_EXIT", 0, "Linux 4.17 and later have them")
    if not traits["xcr0"] & 3:
        raise HostError("KVM offers no XSAVE", 0, MEND_OLD)
    if traits["syscall_ring0"] and not traits["ring0_native"]:
        raise HostError("KVM emulates ring 0 and SYSCALL enters it", 0, "this kind of host is not known")
    return traits


def traits(kvm: int, fresh: bool = False) -> dict[str, Any]:
    """The host's traits by name, from this boot's file when it is there. `kvm`: a descriptor of /dev/kvm."""
    key = f"{_boot_id()}:{VERSION}"
    path = _cache_path()
    if not fresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(path) as file:
                kept = json.load(file)
            if kept["key"] == key and isinstance(kept["traits"], dict):
                return dict(kept["traits"])
    answers = probe(kvm)
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        scratch = f"{path}.{os.getpid()}"
        with open(scratch, "w") as file:
            json.dump({"key": key, "traits": answers}, file)
        os.replace(scratch, path)
    return answers
