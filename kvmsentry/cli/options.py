"""The words of the command line, without click: sizes, volumes, ports, environment; UserError for nonsense."""

from __future__ import annotations

import os

from kvmsentry.errors import UserError
from kvmsentry.sandbox.spec import Publish, Volume

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MIN_MEMORY = 16 << 20  # bytes; below this not even the page tables and a shell fit
MAX_MEMORY = 1 << 46


def memory_size(text: str) -> int:
    """Bytes of "512m", "2g", "1048576"; units are powers of 1024, an i and a B after them change nothing."""
    lowered = text.lower()
    number = lowered.rstrip("bikmgt")
    unit = lowered[len(number) :].removesuffix("b").removesuffix("i")
    if not number.isascii() or not number.isdigit() or unit not in _UNITS:
        raise UserError(f"--memory {text}: give a number with k, m or g, as in 512m")
    size = int(number) * _UNITS[unit]
    if not MIN_MEMORY <= size <= MAX_MEMORY:
        raise UserError(f"--memory {text}: must lie between {MIN_MEMORY >> 20}m and {MAX_MEMORY >> 40}t")
    return size


def volume(text: str) -> Volume:
    """HOST:GUEST[:ro|rw]; HOST must exist, relative ones start at the working directory; GUEST is absolute."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1]:
        raise UserError(f"--volume {text}: HOST:GUEST or HOST:GUEST:ro is wanted")
    host, guest, *mode = parts
    if mode not in ([], ["ro"], ["rw"]):
        raise UserError(f"--volume {text}: {mode[0]!r} is neither ro nor rw")
    if not guest.startswith("/") or ".." in guest.split("/"):
        raise UserError(f"--volume {text}: {guest} is no absolute path")
    guest = os.path.normpath(guest)
    if guest in ("/", "//"):
        raise UserError(f"--volume {text}: the root itself cannot be covered")
    if not os.path.exists(host):
        raise UserError(f"--volume {text}: {host} does not exist on this host")
    return Volume(os.path.realpath(host), guest, mode == ["ro"])


def publish(text: str) -> Publish:
    """[ADDRESS:]HOST_PORT:PORT[/tcp|/udp] or PORT; an IPv6 address stands in brackets."""
    rest, slash, protocol = text.partition("/")
    if slash and protocol not in ("tcp", "udp"):
        raise UserError(f"--publish {text}: {protocol!r} is neither tcp nor udp")
    address = ""
    if rest.startswith("["):
        address, bracket, rest = rest[1:].partition("]:")
        if not bracket:
            raise UserError(f"--publish {text}: the address has no end")
    elif rest.count(":") == 2:
        address, _, rest = rest.partition(":")
    host, colon, guest = rest.partition(":")
    return Publish(address, _port(text, host), _port(text, guest if colon else host), protocol or "tcp")


def _port(text: str, number: str) -> int:
    if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 65535:
        raise UserError(f"--publish {text}: {number!r} is no port")
    return int(number)


def environment(image: list[str], files: list[str], settings: list[str], extra: dict[str, str]) -> list[bytes]:
    """The environment block: the image's, then env files', then -e settings; `extra` fills what nobody has set.

    A bare NAME takes this process's value, and is left out where there is none.
    """
    merged: dict[str, str] = {}
    for setting in image:
        name, equals, value = setting.partition("=")
        if equals:
            merged[name] = value
    for path in files:
        for setting in _env_file(path):
            _set(merged, setting, f"--env-file {path}")
    for setting in settings:
        _set(merged, setting, "--env")
    for name, value in extra.items():
        merged.setdefault(name, value)
    return [os.fsencode(f"{name}={value}") for name, value in merged.items()]


def _set(merged: dict[str, str], setting: str, where: str) -> None:
    name, equals, value = setting.partition("=")
    if not name or any(character.isspace() for character in name) or "\0" in setting:
        raise UserError(f"{where}: {setting[:40]!r} is neither NAME=value nor NAME")
    if equals:
        merged[name] = value
    elif name in os.environ:
        merged[name] = os.environ[name]


def _env_file(path: str) -> list[str]:
    """Lines of an environment file as Docker reads them: blank ones and those with # in front count for nothing."""
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"--env-file {path}: {error.strerror}") from None
    lines = os.fsdecode(text).removeprefix("\ufeff").splitlines()
    return [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def hostname(text: str) -> str:
    """A host name as sethostname(2) and RFC 1123 take it: up to 64 letters, digits, dots and hyphens."""
    allowed = all(character.isascii() and (character.isalnum() or character in "-._") for character in text)
    if not 1 <= len(text) <= 64 or not allowed or text[0] in "-.":
        raise UserError(f"--hostname {text[:70]}: up to 64 letters, digits, dots and hyphens are wanted")
    return text


def open_for_log(path: str) -> int:
    """A descriptor to append to `path`, made if missing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"--debug-log {path}: {error.strerror}") from None
