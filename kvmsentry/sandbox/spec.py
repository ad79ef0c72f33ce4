"""What a sandbox is started with: the one value that crosses from the command line (or OCI) to the launcher."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Volume:
    """A host directory or file seen at `guest` (absolute, as the application sees it)."""

    host: str
    guest: str
    readonly: bool = False


@dataclass(slots=True)
class Publish:
    """A host port that leads to a guest port; `protocol` is "tcp" or "udp", `address` "" is every address."""

    address: str
    host_port: int
    guest_port: int
    protocol: str = "tcp"


@dataclass(slots=True)
class SandboxSpec:
    """Everything `kvmsentry.sandbox.launch.run` needs; checked by whoever fills it in.

    `rootfs` is a directory on the host that the sandbox never writes to when `overlay` is set (a throw-away tmpfs lies
    above it). `argv`, `env` ("NAME=value") and `cwd` are bytes as the application sees them: argv[0] is looked up in
    the guest's PATH by the launcher. `memory_limit` is in bytes, 0 = the launcher's default. Descriptors are -1 when
    absent. `rootfs_owners` is the path of the image store's sidecar map (see kvmsentry.image.owners) when the files on
    disk cannot carry the image's owners and modes, else "".
    """

    rootfs: str
    argv: list[bytes]
    env: list[bytes] = field(default_factory=list)
    cwd: bytes = b"/"
    readonly_root: bool = False
    uid: int = 0
    gid: int = 0
    groups: list[int] = field(default_factory=list)
    hostname: str = "kvmsentry"
    memory_limit: int = 0
    volumes: list[Volume] = field(default_factory=list)
    tty: bool = False
    interactive: bool = False
    platform: str = "auto"
    strace_fd: int = -1
    log_fd: int = -1
    network: str = "none"
    publish: list[Publish] = field(default_factory=list)
    umask: int = 0o022
    overlay: bool = True
    name: str = ""
    rootfs_owners: str = ""
