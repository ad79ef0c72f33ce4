"""The image's config document, checked once: what the image asks to be run with.

OCI image-spec, config.md; Docker's image/spec/spec.md. Both use the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvmsentry.image.faults import ImageFault, Limits

DIGEST_PREFIX = "sha256:"
_ARCHITECTURES = {"amd64", "x86_64"}


@dataclass(slots=True)
class ImageConfig:
    """What the image asks for: `entrypoint` + `cmd` is the command, `env` "NAME=value", `user` "name|uid[:group]"."""

    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: list[str] = field(default_factory=list)
    exposed_ports: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    architecture: str = ""
    os: str = ""
    created: str = ""


def is_digest(text: object) -> bool:
    """Whether `text` is "sha256:" and 64 hex digits, the only kind of digest that layers have in practice."""
    return (
        isinstance(text, str)
        and len(text) == 71
        and text.startswith(DIGEST_PREFIX)
        and not set(text[7:]) - set("0123456789abcdef")
    )


def parse_config(document: Any) -> tuple[ImageConfig, list[str]]:
    """The config and the layers' diff_ids (hex), lowest first. ImageFault names the field that is wrong."""
    top = _mapping(document, "config")
    inner = _mapping(top.get("config"), "config.config")
    config = ImageConfig(
        entrypoint=_strings(inner, "Entrypoint"),
        cmd=_strings(inner, "Cmd"),
        env=_strings(inner, "Env"),
        working_dir=_string(inner, "WorkingDir"),
        user=_string(inner, "User"),
        stop_signal=_string(inner, "StopSignal"),
        volumes=_keys(inner, "Volumes"),
        exposed_ports=_keys(inner, "ExposedPorts"),
        labels=_labels(inner),
        architecture=_string(top, "architecture", "config."),
        os=_string(top, "os", "config."),
        created=_string(top, "created", "config."),
    )
    for setting in config.env:
        if setting.startswith("=") or "\0" in setting:
            raise ImageFault(f"config.config.Env: {setting[:40]!r} is no NAME=value")
    for name in ("entrypoint", "cmd"):
        if any("\0" in word for word in getattr(config, name)):
            raise ImageFault(f"config.config.{name.capitalize()}: a word with a zero byte")
    if "\0" in config.working_dir or "\0" in config.user:
        raise ImageFault("config.config: a zero byte in WorkingDir or User")
    if config.os != "linux":
        raise ImageFault(f"is for the operating system {config.os!r}, not linux")
    if config.architecture not in _ARCHITECTURES:
        raise ImageFault(f"is for the architecture {config.architecture!r}, not amd64")
    rootfs = _mapping(top.get("rootfs"), "config.rootfs")
    diff_ids = _strings(rootfs, "diff_ids", "config.rootfs.")
    for digest in diff_ids:
        if not is_digest(digest):
            raise ImageFault(f"config.rootfs.diff_ids: {digest[:80]!r} is no sha256 digest")
    if len(diff_ids) > Limits.MAX_LAYERS:
        raise ImageFault(f"{len(diff_ids)} layers, more than {Limits.MAX_LAYERS}")
    return config, [digest.removeprefix(DIGEST_PREFIX) for digest in diff_ids]


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ImageFault(f"{name} is {_kind(value)}, not an object")
    return value


def _string(mapping: dict[str, Any], key: str, prefix: str = "config.config.") -> str:
    value = mapping.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ImageFault(f"{prefix}{key} is {_kind(value)}, not a string")
    return value


def _strings(mapping: dict[str, Any], key: str, prefix: str = "config.config.") -> list[str]:
    value = mapping.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ImageFault(f"{prefix}{key} is {_kind(value)}, not a list of strings")
    for item in value:
        if not isinstance(item, str):
            raise ImageFault(f"{prefix}{key} holds {_kind(item)}, not only strings")
    return value


def _keys(mapping: dict[str, Any], key: str) -> list[str]:
    return sorted(_mapping(mapping.get(key), f"config.config.{key}"))


def _labels(mapping: dict[str, Any]) -> dict[str, str]:
    labels = _mapping(mapping.get("Labels"), "config.config.Labels")
    for name, value in labels.items():
        if not isinstance(value, str):
            raise ImageFault(f"config.config.Labels: {name[:80]!r} is {_kind(value)}, not a string")
    return labels


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
