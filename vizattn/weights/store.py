"""From the name of released weights to a file that timm can load: fetched, checked, converted, and kept."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint

from vizattn.errors import VizattnError, unknown
from vizattn.files import explain_disk_errors
from vizattn.weights.convert import converted, metadata_of, save_converted
from vizattn.weights.download import Patience, download, sha256_of
from vizattn.weights.hub import hub_file
from vizattn.weights.place import cache_folder, cached_file, locked
from vizattn.weights.reading import read_weights
from vizattn.weights.trust import Trusted, manifest, record, trusted

__all__ = ["Release", "fetch", "find", "release_names", "release_of"]

logger = logging.getLogger("vizattn")


@dataclass(frozen=True)
class Release:
    """Weights that somebody published for one of our models."""

    cfg: PretrainedCfg
    key: str
    """``name.tag``, with a hash behind it where a user gave another address."""
    url: str | None
    hub_id: str | None

    @property
    def file_name(self) -> str:
        """The name of the published file, here and on a mirror."""
        return manifest().get(self.key, {}).get("file", f"{self.key}.{'safetensors' if self.hub_id else 'pth'}")

    @property
    def origin(self) -> str:
        """Where it is published, for people."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else str(self.url)


def release_of(cfg: PretrainedCfg) -> Release | None:
    """The release that `cfg` names by an address, None if it names none. As in timm the hub goes before a URL."""
    if not (cfg.hf_hub_id or cfg.url):
        return None
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    registered = get_pretrained_cfg(name)
    address = (cfg.hf_hub_id, cfg.hf_hub_filename, cfg.url)
    if registered is None or address != (registered.hf_hub_id, registered.hf_hub_filename, registered.url):
        name += f"-{hashlib.sha256(repr(address).encode()).hexdigest()[:12]}"
    url = cfg.url if isinstance(cfg.url, str | None) else cfg.url[0]
    return Release(cfg, name, None if cfg.hf_hub_id else url, cfg.hf_hub_id)


def release_names() -> list[str]:
    """``name.tag`` of all our weights, packaged ones too."""
    return [
        name
        for name in timm.list_models(pretrained=True)
        if model_entrypoint(name.partition(".")[0]).__module__.startswith("vizattn.")
    ]


def find(name: str) -> PretrainedCfg:
    """The cfg of ``name.tag``, or of a name's default weights.

    Raises:
        VizattnError: There is no such backbone of ours, or it has no such weights.
    """
    names = release_names()
    cfg = get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    full = f"{cfg.architecture}.{cfg.tag}" if cfg is not None else None
    if full not in names or cfg is None:
        raise unknown("weights", name, [*names, *{n.partition(".")[0] for n in names}], "vizattn weights list")
    return cfg


def fetch(release: Release, given: Path | None = None, again: bool = False, patience: Patience | None = None) -> Path:
    """The converted weights of `release` in the cache, fetched if they are not there.

    Args:
        release: Which.
        given: The published file, fetched by hand.
        again: Do not use what is in the cache.
        patience: How long to try.

    Raises:
        VizattnError: They cannot be had, are not the right ones, or cannot be kept.
    """
    target = cached_file(release.key)
    if not again and given is None and _usable(target, release):
        return target
    with (
        explain_disk_errors(cache_folder(), "choose another folder by the environment variable VIZATTN_HOME"),
        locked(release.key),
    ):
        if not again and given is None and _usable(target, release):  # another process was faster
            return target
        path, source = (given, str(given)) if given else _obtain(release, trusted(release.key), patience)
        size, sha256 = path.stat().st_size, sha256_of(path)
        _check(path, size, sha256, trusted(release.key))
        state = converted(read_weights(path), release.cfg)
        save_converted(state, target, name=release.key, source=source, source_size=str(size), source_sha256=sha256)
        record(release.key, source, size, sha256)
        if path.parent == _downloads():
            path.unlink()  # the converted file has all of it
        return target


def _downloads() -> Path:
    return cache_folder() / "downloads"


def _usable(path: Path, release: Release) -> bool:
    """Whether the converted file is there, whole, and made from the file that is trusted; trusts it where none is."""
    notes = metadata_of(path)
    if notes is None:
        return False
    right = trusted(release.key)
    if right.sha256 is None:
        with suppress(OSError):  # a cache that others filled may be read-only
            record(release.key, notes["source"], int(notes["source_size"]), notes["source_sha256"])
    return notes["source_sha256"] == (right.sha256 or notes["source_sha256"])


def _obtain(release: Release, right: Trusted, patience: Patience | None) -> tuple[Path, str]:
    """The published file and the address it came from: what an earlier call left, a mirror, the hub or the URL."""
    target = _downloads() / release.file_name
    if target.is_file():  # it arrived whole, but was not converted
        return target, release.origin
    target.parent.mkdir(parents=True, exist_ok=True)
    mirror = os.environ.get("VIZATTN_MIRROR")
    urls = [f"{mirror.rstrip('/')}/{release.file_name}"] if mirror else []
    reasons = []
    try:
        if urls or release.url:
            urls += [release.url] if release.url else []
            logger.info("Fetching the weights %s from %s.", release.key, urls[0])
            return target, download(urls, target, right, release.file_name, patience)[0]
    except VizattnError as error:
        reasons.append(str(error))
    try:
        if release.hub_id:
            logger.info("Fetching the weights %s from the Hugging Face hub, %s.", release.key, release.hub_id)
            return hub_file(release.hub_id, release.cfg.hf_hub_filename), release.origin
    except VizattnError as error:
        reasons.append(str(error))
    by_hand = f"vizattn weights fetch {release.key} --from FILE"
    raise VizattnError(
        f"The weights {release.key} cannot be fetched. {' '.join(reasons)} Try again later, or get the file by hand "
        f"from {release.origin} and give it with: {by_hand}"
    )


def _check(path: Path, size: int, sha256: str, right: Trusted) -> None:
    """Raise unless the file is the trusted one."""
    if size == (right.size or size) and sha256 == (right.sha256 or sha256):
        return
    raise VizattnError(
        f"{path} is not the file that {right.according_to} knows: it has {size} bytes and SHA-256 {sha256}, not "
        f"{right.size or size} bytes and {right.sha256 or 'any'}. If it was replaced on purpose, remove it there."
    )
