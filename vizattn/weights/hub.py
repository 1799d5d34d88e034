"""Files of the Hugging Face hub, by its own client: its cache, resuming, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, logins."""

from __future__ import annotations

from pathlib import Path

from vizattn.errors import VizattnError
from vizattn.version import __version__

__all__ = ["hub_file"]

_NAMES = ("model.safetensors", "pytorch_model.bin")


def hub_file(hub_id: str, filename: str | None = None, again: bool = False) -> Path:
    """The weights of a repository, fetched unless the hub's cache has them.

    Args:
        hub_id: ``owner/name``, or ``owner/name@revision``.
        filename: By default what timm looks for.
        again: Do not use what is in the hub's cache.

    Raises:
        VizattnError: They cannot be had.
        OSError: They cannot be written.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repository, _, revision = hub_id.partition("@")
    names = [filename] if filename else _NAMES
    unreached: tuple[str, LocalEntryNotFoundError] | None = None
    for name in names:
        try:
            return Path(
                hf_hub_download(
                    repository,
                    name,
                    revision=revision or None,
                    library_name="vizattn",
                    library_version=__version__,
                    force_download=again and unreached is None,
                    local_files_only=unreached is not None,  # no use waiting for the hub again
                )
            )
        except LocalEntryNotFoundError as error:
            unreached = unreached or (name, error)  # the cache may have the next
        except EntryNotFoundError:
            continue
        except GatedRepoError as error:
            raise VizattnError(f"{hub_id} asks for consent: give it on the hub, then `hf auth login`.") from error
        except RepositoryNotFoundError as error:
            raise VizattnError(f"{hub_id}: no such repository, or only after `hf auth login`.") from error
        except Exception as error:  # of its HTTP library, of its storage, its own
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # the disk
            raise VizattnError(f"{hub_id}/{name}: {_first_line(error)}.") from error
    if unreached:
        name, missing = unreached
        reason = "it is not in the hub's cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
        raise VizattnError(f"{hub_id}/{name}: {reason} ({_first_line(missing.__cause__ or missing)}).") from missing
    raise VizattnError(f"{hub_id} has none of {', '.join(names)}.")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
