"""/etc/hosts, /etc/hostname and /etc/resolv.conf of a sandbox: small files of a tmpfs mounted over the image's, as
engines do it. An image that has its own keeps it where the sandbox has no network that makes it wrong."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from kvmsentry.errors import Errno
from kvmsentry.fs import mounts, mounttree, vfs
from kvmsentry.fs.tmpfs import TmpSuper
from kvmsentry.kernel.task import Credentials
from kvmsentry.sandbox.spec import SandboxSpec

if TYPE_CHECKING:
    from kvmsentry.sandbox.network import Network


class _Root:
    """Enough of a task to walk with: root."""

    def __init__(self, kernel: Any, root: vfs.Path) -> None:
        self.kernel, self.fs, self.creds = kernel, vfs.FsContext(root, root), Credentials()


def texts(spec: SandboxSpec, network: Network) -> dict[bytes, str]:
    """What the files say."""
    name = spec.hostname
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::0\tip6-localnet",
             "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters"]  # fmt: skip
    lines.append(f"{network.guest_address or '127.0.1.1'}\t{name}")
    files = {b"hosts": "\n".join(lines) + "\n", b"hostname": name + "\n"}
    resolv = network.resolv_conf
    if resolv is not None:
        files[b"resolv.conf"] = resolv
    return files


def write(kernel: Any, root: vfs.Path, spec: SandboxSpec, network: Network) -> None:
    """Mount them. Nothing happens for an image without /etc, or with a directory in a file's place."""
    if spec.rootfs == "/" and network.mode in ("none", "host"):
        return  # this host's own files, shown as they are
    task: Any = _Root(kernel, root)
    sb: TmpSuper | None = None
    for name, text in texts(spec, network).items():
        try:
            place = vfs.walk(task, b"/etc/" + name)
        except Errno:
            place = None
        if place is not None and not stat.S_ISREG(place.inode.mode):
            continue
        if place is not None and network.mode == "none" and place.inode.size:
            continue
        if sb is None:
            sb = TmpSuper(kernel, mode=0o755)
        if place is None:
            try:
                place = mounts.mountpoint(task, b"/etc/" + name, stat.S_IFREG)
            except Errno:
                continue  # no /etc, or nothing may be written: the application does without it
        inode = sb.root.create(name, stat.S_IFREG | 0o644, task.creds)
        mount = mounttree.new_mount(sb)
        dentry = mount.root.add(name, inode)
        mount.root = dentry
        file = inode.open(task, vfs.Path(mount, dentry), vfs.O_WRONLY)
        file.write([memoryview(bytearray(text.encode()))])
        file.put()
        mounttree.attach(mount, mounttree.summit(place))
