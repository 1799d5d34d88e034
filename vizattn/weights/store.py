"""From the name of released weights to a file that timm can load: fetched, checked, converted, and kept."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint

from vizattn.errors import VizattnError, unknown
from vizattn.files import explain_disk_errors, sha256_of
from vizattn.weights.convert import converted, metadata_of, save_converted, tensors_digest
from vizattn.weights.download import Patience, download, without_login
from vizattn.weights.hub import hub_file
from vizattn.weights.place import cache_folder, cached_file, checked, locked
from vizattn.weights.reading import read_weights
from vizattn.weights.trust import Trusted, manifest, record, trusted

__all__ = ["Release", "fetch", "find", "release_names", "release_of", "verify"]

logger = logging.getLogger("vizattn")


@dataclass(frozen=True)
class Release:
    """Weights that somebody published for one of our models."""

    cfg: PretrainedCfg
    key: str
    """``name.tag``, with a hash behind it where a user gave another address; it says what `cfg` makes of the file."""
    url: str | None
    hub_id: str | None

    @property
    def file_name(self) -> str:
        """The name of the published file, here and on a mirror."""
        return (
            manifest().get(self.key, {}).get("file", f"{checked(self.key)}.{'safetensors' if self.hub_id else 'pth'}")
        )

    @property
    def origin(self) -> str:
        """Where it is published, for people."""
        return f"https://huggingface.co/{self.hub_id}" if self.hub_id else str(self.url)


def release_of(cfg: PretrainedCfg) -> Release | None:
    """The release that `cfg` names by an address, None if it names none. As in timm the hub goes before a URL.

    At the registered address are the registered weights: what else of `cfg` differs concerns the model, not the file.
    """
    if not (cfg.hf_hub_id or cfg.url):
        return None
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    registered = get_arch_pretrained_cfgs(str(cfg.architecture)).get(name)
    address = (cfg.hf_hub_id, cfg.hf_hub_filename, cfg.url)
    if registered and address == (registered.hf_hub_id, registered.hf_hub_filename, registered.url):
        cfg = registered
    else:
        converted_for = (*address, tuple(cfg.input_size), cfg.num_classes)
        name += f"-{hashlib.sha256(repr(converted_for).encode()).hexdigest()[:12]}"
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
    names += sorted({full.partition(".")[0] for full in names})
    cfg = get_pretrained_cfg(name) if name in names else None
    if cfg is None or f"{cfg.architecture}.{cfg.tag}" not in names:  # a name's default may be the one without weights
        raise unknown("weights", name, names, "vizattn weights list")
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
    if given is not None and not given.is_file():
        raise VizattnError(f"There is no file {given}.")
    target = cached_file(release.key)
    if not again and given is None and _usable(target, release):
        return target
    with (
        explain_disk_errors(cache_folder(), "choose another folder by the environment variable VIZATTN_HOME"),
        locked(release.key),
    ):
        if not again and given is None and _usable(target, release):  # another process was faster
            return target
        right = trusted(release.key)
        path, source = (given, given.name) if given else _obtain(release, right, again, patience)
        ours = not given and path.parent == cache_folder() / "downloads"
        size, sha256 = path.stat().st_size, sha256_of(path)
        right.check(str(path), size, sha256)
        try:
            state = converted(read_weights(path), release.cfg)
        except VizattnError as error:
            if ours and not right.sha256:  # it may be any file; one of a known hash waits for a better vizattn
                path.unlink()
            mend = "" if given or ours else f" Fetch it anew with: vizattn weights fetch {release.key} --again"
            raise VizattnError(f"What came from {source} cannot be used. {error}{mend}") from error
        save_converted(state, target, name=release.key, source=source, source_size=str(size), source_sha256=sha256)
        record(release.key, source, size, sha256)
        if ours:
            path.unlink()  # the converted file has all of it
        return target


def verify(release: Release) -> str:
    """``"ok"``, ``"not fetched"``, or what is wrong with the converted weights in the cache.

    Raises:
        VizattnError: The lock file is damaged.
    """
    path = cached_file(release.key)
    if not path.is_file():
        return "not fetched"
    notes, right = metadata_of(path), trusted(release.key)
    if notes is None or tensors_digest(read_weights(path)) != notes.get("tensors_sha256"):
        return f"damaged; mend it with: vizattn weights fetch {release.key} --again"
    if notes.get("source_sha256") != (right.sha256 or notes.get("source_sha256")):
        return f"made from another file than {right.according_to} says"
    return "ok"


def _usable(path: Path, release: Release) -> bool:
    """Whether the converted file is there, whole, and made from the file that is trusted; trusts it where none is."""
    notes = metadata_of(path)
    if notes is None:
        return False
    right, sha256 = trusted(release.key), notes.get("source_sha256")
    if right.sha256 is None and sha256:
        with suppress(OSError):  # a cache that others filled may be read-only
            record(release.key, notes.get("source", ""), int(notes.get("source_size", 0)), sha256)
    return sha256 is not None and sha256 == (right.sha256 or sha256)


def _obtain(release: Release, right: Trusted, again: bool, patience: Patience | None) -> tuple[Path, str]:
    """The published file and the address it came from: what an earlier call left, a mirror, the hub or the URL."""
    target = cache_folder() / "downloads" / release.file_name
    if not again:
        with suppress(VizattnError, FileNotFoundError):  # an earlier call was stopped before it converted the file
            right.check(target.name, target.stat().st_size, sha256_of(target))
            return target, release.origin
    target.parent.mkdir(parents=True, exist_ok=True)
    mirror = os.environ.get("VIZATTN_MIRROR")
    urls = [f"{mirror.rstrip('/')}/{release.file_name}"] if mirror else []
    reasons = []
    try:
        if urls or release.url:
            urls += [release.url] if release.url else []
            logger.info("Fetching the weights %s from %s.", release.key, without_login(urls[0]))
            return target, download(urls, target, right, release.file_name, patience)[0]
    except VizattnError as error:
        reasons.append(str(error))
    try:
        if release.hub_id:
            logger.info("Fetching the weights %s from the Hugging Face hub, %s.", release.key, release.hub_id)
            return hub_file(release.hub_id, release.cfg.hf_hub_filename, again), release.origin
    except VizattnError as error:
        reasons.append(str(error))
    by_hand = f"vizattn weights fetch {release.key} --from FILE"
    raise VizattnError(
        f"The weights {release.key} cannot be fetched. {' '.join(reasons)} Try again later, or get the file by hand "
        f"from {release.origin} and give it with: {by_hand}"
    )
