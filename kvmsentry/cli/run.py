"""`kvmsentry run` and `kvmsentry do`: from words to a SandboxSpec, then to the launcher."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from kvmsentry.cli import options
from kvmsentry.errors import UserError
from kvmsentry.sandbox.spec import SandboxSpec

if TYPE_CHECKING:
    from kvmsentry.image import Image

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORKS = ("none", "host", "bridge", "veth", "pasta", "slirp4netns")
_OPTIONS_END_AT_IMAGE = {"allow_interspersed_args": False}


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how the sandbox works, for `run` and `do` alike."""
    for option in reversed(
        [
            click.option("--platform", default="auto", envvar="KVMSENTRY_PLATFORM", metavar="auto|kvm|ptrace",
                         help="What runs the application (default: $KVMSENTRY_PLATFORM, or auto)."),
            click.option("--memory", "-m", metavar="SIZE", help="Most memory the sandbox may use, as in 512m or 2g."),
            click.option("--network", "--net", default="none", show_default=True, metavar="|".join(NETWORKS),
                         help="Which network: nothing but loopback, a way out through the host, or the host's own."),
            click.option("--hostname", "-h", metavar="NAME", help="Host name inside (default: the sandbox's name)."),
            click.option("--volume", "-v", "volumes", multiple=True, metavar="HOST:GUEST[:ro|rw]",
                         help="Show a file or directory of the host inside. May be repeated."),
            click.option("--strace", is_flag=True, help="Write every system call to stderr, or to --debug-log."),
            click.option("--debug-log", metavar="FILE", help="Append the sandbox's log to FILE."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(context_settings=_OPTIONS_END_AT_IMAGE, add_help_option=False)
@click.argument("image", metavar="IMAGE.tar")
@click.argument("command", nargs=-1, metavar="[COMMAND [ARGUMENT...]]", type=click.UNPROCESSED)
@click.option("--interactive", "-i", is_flag=True, help="Pass standard input on (otherwise it is /dev/null).")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option(
    "--env",
    "-e",
    "settings",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set an environment variable; NAME alone passes ours through.",
)
@click.option("--env-file", "files", multiple=True, metavar="FILE", help="Variables from a file, one a line.")
@click.option("--workdir", "-w", metavar="DIR", help="Working directory (default: the image's).")
@click.option("--user", "-u", metavar="NAME|UID[:GROUP]", help="Who to run as (default: the image's).")
@click.option("--entrypoint", metavar="WORDS", help="In place of the image's entrypoint; its command is then dropped.")
@click.option("--read-only", "readonly", is_flag=True, help="The root filesystem cannot be written to.")
@click.option(
    "--publish",
    "-p",
    "ports",
    multiple=True,
    metavar="[ADDRESS:]PORT:PORT[/udp]",
    help="Make a port of the sandbox reachable.",
)
@click.option("--image-ref", metavar="TAG|ID", help="Which image, when the archive holds several.")
@click.option("--name", metavar="NAME", help="What the sandbox is called in messages.")
@click.option("--rm", is_flag=True, hidden=True, help="Accepted for habit's sake: nothing is ever kept.")
@common
@click.help_option("--help")  # -h is the host name, as everywhere
def run(image: str, command: tuple[str, ...], image_ref: str | None, **given: Any) -> int:
    """Run a command in an image.

    IMAGE.tar is what `docker save` or `podman save` writes, or an OCI layout as a tar or a directory. It is unpacked
    once and never written to: what the command changes is gone when it ends.

    \b
    kvmsentry run alpine.tar
    kvmsentry run -it --memory 512m debian.tar bash
    kvmsentry run -v ./src:/src:ro -w /src python.tar python3 -m unittest
    """
    from kvmsentry.image import open_image

    if given["tty"] and given["interactive"] and not sys.stdin.isatty():
        raise UserError("-i -t: standard input is no terminal")
    stem = os.path.basename(os.path.normpath(image)).removesuffix(".tar")
    spec = _common_spec(given, given["name"] or stem or "image")  # before the unpacking, which may take a while
    spec.publish = [options.publish(port) for port in given["ports"]]
    with unpacking(image) as progress:
        opened = open_image(image, image_ref, progress)
    _complete(spec, opened, image, list(command), given)
    return _launch(spec)


def _complete(spec: SandboxSpec, image: Image, path: str, command: list[str], given: dict[str, Any]) -> None:
    """Fill in what depends on the image."""
    from kvmsentry.image import resolve_user

    config = image.config
    words = _command(config.entrypoint, config.cmd, given["entrypoint"], command)
    if not words:
        raise UserError(f"{path}: the image names no command, and none was given")
    workdir = given["workdir"] or config.working_dir or "/"
    if not workdir.startswith("/"):
        raise UserError(f"the working directory {workdir} is no absolute path")
    user = resolve_user(image.rootfs, config.user if given["user"] is None else given["user"])
    spec.rootfs, spec.rootfs_owners = image.rootfs, image.owners
    spec.argv = [os.fsencode(word) for word in words]
    extra = {"PATH": DEFAULT_PATH, "HOSTNAME": spec.hostname, "HOME": user.home}
    if given["tty"]:
        extra["TERM"] = os.environ.get("TERM", "xterm")
    spec.env = options.environment(config.env, list(given["files"]), list(given["settings"]), extra)
    spec.cwd = os.fsencode(workdir)
    spec.uid, spec.gid, spec.groups = user.uid, user.gid, user.groups
    spec.readonly_root = given["readonly"]
    spec.tty, spec.interactive = given["tty"], given["interactive"]


def _command(entrypoint: list[str], cmd: list[str], override: str | None, given: list[str]) -> list[str]:
    """Docker's rule: arguments replace the image's command; a new entrypoint drops it; an empty one leaves none."""
    if override is not None:
        try:
            return shlex.split(override) + given
        except ValueError as error:
            raise UserError(f"--entrypoint {override}: {error}") from None
    return entrypoint + (given or cmd)


@click.command("do", context_settings=_OPTIONS_END_AT_IMAGE, add_help_option=False)
@click.argument("command", nargs=-1, required=True, metavar="COMMAND [ARGUMENT...]", type=click.UNPROCESSED)
@common
@click.help_option("--help")
def do(command: tuple[str, ...], **given: Any) -> int:
    """Run a command of this host in a sandbox, on this host's files.

    It sees the host's root filesystem as you do, in the same directory with the same environment; what it writes goes
    to memory and is thrown away at the end.

    \b
    kvmsentry do ls -l
    kvmsentry do --strace python3 script.py
    """
    spec = _common_spec(given, "do")
    spec.argv = [os.fsencode(word) for word in command]
    spec.env = [name + b"=" + value for name, value in os.environb.items()]
    try:
        spec.cwd = os.getcwdb()
    except FileNotFoundError:
        raise UserError("the working directory does not exist any more") from None
    spec.uid, spec.gid, spec.groups = os.getuid(), os.getgid(), os.getgroups()
    spec.interactive = True
    spec.tty = sys.stdin.isatty() and sys.stdout.isatty()
    spec.umask = _umask()
    return _launch(spec)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _common_spec(given: dict[str, Any], name: str) -> SandboxSpec:
    platform, network = given["platform"], given["network"]
    if platform not in ("auto", "kvm", "ptrace"):
        raise UserError(f"--platform {platform}: auto, kvm and ptrace are known")
    if network not in NETWORKS:
        raise UserError(f"--network {network}: {', '.join(NETWORKS)} are known")
    default = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name).strip("-")[:63]
    log_fd = strace_fd = -1
    volumes = [options.volume(text) for text in given["volumes"]]
    memory = options.memory_size(given["memory"]) if given["memory"] else 0
    host = options.hostname(given["hostname"]) if given["hostname"] else default or "kvmsentry"
    if given["debug_log"]:
        log_fd = options.open_for_log(given["debug_log"])
    if given["strace"]:
        strace_fd = log_fd if log_fd >= 0 else os.dup(2)
    return SandboxSpec(
        rootfs="/",
        argv=[],
        hostname=host,
        memory_limit=memory,
        volumes=volumes,
        platform=platform,
        network=network,
        strace_fd=strace_fd,
        log_fd=log_fd,
        name=name,
    )


def _launch(spec: SandboxSpec) -> int:
    from kvmsentry.sandbox import launch

    return launch.run(spec)


@contextlib.contextmanager
def unpacking(path: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on the terminal, which shows itself once there is something to tell."""
    if not sys.stderr.isatty():
        yield None
        return
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = click.progressbar(length=total, label=f"unpacking {os.path.basename(path)}", file=sys.stderr)
            bar.__enter__()
        bar.update(done - bar.pos)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
