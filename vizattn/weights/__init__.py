"""Released weights: fetched, checked, read safely, converted to our keys, and kept. See `store.fetch`."""

from vizattn.weights.convert import (
    converted,
    fitted,
    metadata_of,
    released,
    save_converted,
    save_released,
    tensors_digest,
)
from vizattn.weights.place import cache_folder, cached_file, kept_in
from vizattn.weights.published import published
from vizattn.weights.reading import read_weights
from vizattn.weights.store import Release, fetch, find, release_names, release_of, verify
from vizattn.weights.trust import lock_file, manifest, trusted

__all__ = [
    "Release",
    "cache_folder",
    "cached_file",
    "converted",
    "fetch",
    "find",
    "fitted",
    "kept_in",
    "lock_file",
    "manifest",
    "metadata_of",
    "published",
    "read_weights",
    "release_names",
    "release_of",
    "released",
    "save_converted",
    "save_released",
    "tensors_digest",
    "trusted",
    "verify",
]
