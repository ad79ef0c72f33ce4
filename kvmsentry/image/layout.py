"""Which image of an archive: docker-archive's manifest.json and OCI's index, manifests and platforms.

OCI image-spec (image-layout.md, image-index.md, manifest.md); Docker's image/spec/spec.md. Every document that is named
by a digest is checked against it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from kvmsentry.image.archive import Archive
from kvmsentry.image.config import ImageConfig, is_digest, parse_config
from kvmsentry.image.faults import ImageFault, Limits

_INDEX_TYPES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_CONFIG_TYPES = {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
_MAX_NESTING = 4


@dataclass(slots=True)
class Layer:
    """A member of the archive; `digest` (hex) and `size` of its packed form where the archive tells them."""

    member: str
    diff_id: str
    digest: str = ""
    size: int = -1


@dataclass(slots=True)
class Selected:
    """The image that was chosen: `id` is the hex digest of its config."""

    id: str
    config: ImageConfig
    layers: list[Layer]
    tags: list[str]

    @property
    def chain_id(self) -> str:
        """OCI config.md "Layer ChainID" of the whole stack, hex."""
        chain = ""
        for layer in self.layers:
            pair = f"sha256:{chain} sha256:{layer.diff_id}"
            chain = hashlib.sha256(pair.encode()).hexdigest() if chain else layer.diff_id
        return chain or hashlib.sha256(b"").hexdigest()


def select_image(archive: Archive, ref: str | None) -> Selected:
    """The only image of the archive, or the one that `ref` (a tag or an id) names. ImageFault when none or several."""
    manifest = archive.document("manifest.json")
    if manifest is not None:
        return _from_docker(archive, _parsed(manifest, "manifest.json"), ref)
    index = archive.document("index.json")
    if index is not None:
        return _from_oci(archive, _parsed(index, "index.json"), ref)
    raise ImageFault("holds no image: neither manifest.json (docker save) nor index.json (OCI layout) is in it")


# --------------------------------------------------------------------------------------------------------- docker


def _from_docker(archive: Archive, manifest: Any, ref: str | None) -> Selected:
    if not isinstance(manifest, list) or not manifest or not all(isinstance(item, dict) for item in manifest):
        raise ImageFault("manifest.json is no list of images")
    if len(manifest) > Limits.MAX_MEMBERS:
        raise ImageFault("manifest.json lists too many images")
    images = []
    for item in manifest:
        name, tags, layers = item.get("Config"), item.get("RepoTags") or [], item.get("Layers") or []
        if not isinstance(name, str):
            raise ImageFault("manifest.json: Config is no string")
        for field, value in (("RepoTags", tags), ("Layers", layers)):
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise ImageFault(f"manifest.json: {field} is no list of strings")
        images.append((name, tags, layers))
    chosen = _choose([(tags, [_hex_in(name)]) for name, tags, _ in images], ref)
    name, tags, layers = images[chosen]
    document = archive.document(name)
    if document is None:
        raise ImageFault(f"the config {name} is missing")
    digest = hashlib.sha256(document).hexdigest()
    if _hex_in(name) not in ("", digest):
        raise ImageFault(f"the config {name} has the wrong digest sha256:{digest}")
    config, diff_ids = parse_config(_parsed(document, name))
    if len(layers) != len(diff_ids):
        raise ImageFault(f"manifest.json has {len(layers)} layers, the config {len(diff_ids)}")
    return Selected(
        digest,
        config,
        [
            # blobs/sha256/<digest>: newer Docker writes both layouts in one archive
            Layer(member, diff_id, digest=_hex_in(member) if member.startswith("blobs/sha256/") else "")
            for member, diff_id in zip(layers, diff_ids, strict=True)
        ],
        tags,
    )


def _hex_in(name: str) -> str:
    """The sha256 that a member is named after, "" when it is not."""
    match = re.search(r"(?:^|[/:])([0-9a-f]{64})(?:\.json)?$", name)
    return match[1] if match else ""


# ------------------------------------------------------------------------------------------------------------ OCI


def _from_oci(archive: Archive, index: Any, ref: str | None) -> Selected:
    layout = archive.document("oci-layout")
    if layout is not None:
        version = _object(_parsed(layout, "oci-layout"), "oci-layout").get("imageLayoutVersion")
        if not isinstance(version, str) or not version.startswith("1."):
            raise ImageFault(f"oci-layout: version {version!r} is unknown")
    descriptors = [item for item in _manifests(index, "index.json") if not _is_attestation(item)]
    named = []
    for descriptor in descriptors:
        annotations = descriptor.get("annotations") or {}
        if not isinstance(annotations, dict):
            raise ImageFault("index.json: annotations is no object")
        tags = [annotations.get(key) for key in (_FULL_NAME, _REF_NAME)]
        named.append([tag for tag in dict.fromkeys(tags) if isinstance(tag, str)])
    # An index may list one image for several platforms side by side: that is one choice, not several.
    candidates = list(range(len(descriptors)))
    if len(descriptors) > 1:
        candidates = [number for number in candidates if _platform(descriptors[number]) in ("", "linux/amd64")]
        if not candidates:
            raise ImageFault(f"has no image for linux/amd64, only for {_platforms(descriptors)}")
    by_id = ref is not None and _looks_like_id(ref)
    digests = [
        [_hex_of(descriptors[at]), *([_image_id(archive, descriptors[at])] if by_id else [])] for at in candidates
    ]
    choice = _choose([(named[at], hexes) for at, hexes in zip(candidates, digests, strict=True)], ref)
    chosen = candidates[choice]
    return _from_manifest(archive, _manifest_of(archive, descriptors[chosen], 0), named[chosen])


def _image_id(archive: Archive, descriptor: dict[str, Any]) -> str:
    """The config's digest of a descriptor's image, "" when it cannot be told."""
    try:
        return _hex_of(_object(_manifest_of(archive, descriptor, 0).get("config"), "config"))
    except ImageFault:
        return ""


def _manifest_of(archive: Archive, descriptor: dict[str, Any], depth: int) -> dict[str, Any]:
    """The manifest for linux/amd64 that a descriptor leads to, through nested indexes."""
    if depth > _MAX_NESTING:
        raise ImageFault("indexes are nested too deep")
    digest = _hex_of(descriptor)
    document = _object(_parsed(_blob(archive, digest, "manifest"), f"manifest sha256:{digest}"), "manifest")
    if document.get("mediaType", descriptor.get("mediaType")) not in _INDEX_TYPES and "manifests" not in document:
        return document
    inner = [item for item in _manifests(document, f"index sha256:{digest}") if not _is_attestation(item)]
    fitting = [item for item in inner if _fits(item)] or [item for item in inner if not _platform(item)]
    if not fitting:
        raise ImageFault(f"has no image for linux/amd64, only for {_platforms(inner)}")
    return _manifest_of(archive, fitting[0], depth + 1)


def _from_manifest(archive: Archive, manifest: dict[str, Any], tags: list[str]) -> Selected:
    described = _object(manifest.get("config"), "manifest: config")
    if described.get("mediaType", "application/vnd.oci.image.config.v1+json") not in _CONFIG_TYPES:
        raise ImageFault(f"is no container image: its config is of type {described.get('mediaType')!r}")
    image_id = _hex_of(described)
    document = _blob(archive, image_id, "config")
    config, diff_ids = parse_config(_parsed(document, f"config sha256:{image_id}"))
    layers = manifest.get("layers") or []
    if not isinstance(layers, list):
        raise ImageFault("manifest: layers is no list")
    if len(layers) != len(diff_ids):
        raise ImageFault(f"the manifest has {len(layers)} layers, the config {len(diff_ids)}")
    chosen = []
    for item, diff_id in zip(layers, diff_ids, strict=True):
        digest, size = _hex_of(_object(item, "manifest: a layer")), item.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ImageFault("manifest: a layer's size is no whole number")
        if str(item.get("mediaType", "")).endswith("+encrypted"):
            raise ImageFault(f"layer sha256:{digest} is encrypted")
        chosen.append(Layer(f"blobs/sha256/{digest}", diff_id, digest, size))
    return Selected(image_id, config, chosen, tags)


def _blob(archive: Archive, digest: str, what: str) -> bytes:
    document = archive.document(f"blobs/sha256/{digest}")
    if document is None:
        raise ImageFault(f"the {what} sha256:{digest} is missing")
    actual = hashlib.sha256(document).hexdigest()
    if actual != digest:
        raise ImageFault(f"the {what} sha256:{digest} has the wrong digest sha256:{actual}")
    return document


def _manifests(index: Any, name: str) -> list[dict[str, Any]]:
    items = _object(index, name).get("manifests")
    if not isinstance(items, list) or not items or len(items) > Limits.MAX_MEMBERS:
        raise ImageFault(f"{name} lists no manifests")
    return [_object(item, f"{name}: a manifest") for item in items]


def _platform(descriptor: dict[str, Any]) -> str:
    platform = descriptor.get("platform")
    if platform is None:
        return ""
    if not isinstance(platform, dict):
        raise ImageFault("index: platform is no object")
    return f"{platform.get('os')}/{platform.get('architecture')}"


def _platforms(descriptors: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({_platform(item) or "unnamed" for item in descriptors})[:8])


def _fits(descriptor: dict[str, Any]) -> bool:
    return _platform(descriptor) == "linux/amd64"


def _is_attestation(descriptor: dict[str, Any]) -> bool:
    return _platform(descriptor) == "unknown/unknown"  # BuildKit's provenance and SBOM manifests


def _hex_of(descriptor: dict[str, Any]) -> str:
    digest = descriptor.get("digest")
    if not is_digest(digest):
        raise ImageFault(f"{str(digest)[:80]!r} is no sha256 digest")
    return str(digest)[7:]


# ---------------------------------------------------------------------------------------------------------- names


def _choose(images: list[tuple[list[str], list[str]]], ref: str | None) -> int:
    """The number of the image that `ref` names among (tags, ids in hex); without `ref` there must be one only."""
    if ref is None:
        found = list(range(len(images)))
    else:
        found = [number for number, (tags, digests) in enumerate(images) if _matches(ref, tags, digests)]
    if len(found) == 1:
        return found[0]
    names = [tags[0] if tags else digests[0][:12] for tags, digests in images]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if not found:
        raise ImageFault(f"holds no image {ref}, only {listed}")
    raise ImageFault(f"holds several images, choose one with --image-ref: {listed}")


def _looks_like_id(ref: str) -> bool:
    return re.fullmatch(r"(sha256:)?[0-9a-f]{6,64}", ref) is not None


def _matches(ref: str, tags: list[str], digests: list[str]) -> bool:
    """A tag in full, without its ":latest", without its registry; or the first six or more digits of an id."""
    if _looks_like_id(ref) and any(digest.startswith(ref.removeprefix("sha256:")) for digest in digests if digest):
        return True
    return any(ref in short_names(tag) for tag in tags)


def short_names(tag: str) -> set[str]:
    """Every way to write a tag: "docker.io/library/busybox:latest" is also "busybox"."""
    names = {tag}
    for prefix in ("docker.io/library/", "docker.io/", "localhost/"):
        if tag.startswith(prefix):
            names.add(tag.removeprefix(prefix))
    return names | {name.removesuffix(":latest") for name in names}


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ImageFault(f"{name} is no object")
    return value


def _parsed(document: bytes, name: str) -> Any:
    try:
        value = json.loads(document)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # a lone surrogate, "\\ud800", is in no file name and no environment
        return value
    except (ValueError, RecursionError):
        raise ImageFault(f"{name} is no JSON") from None
