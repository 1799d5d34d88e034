"""What one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds on uploads, memory and time."""

    upload_bytes: int = 20 << 20
    """Of a whole request."""
    pixels: int = 50_000_000
    """Of a picture, as its header says, before it is decoded."""
    segmented_side: int = 1024
    """Pixels of the longer side; larger pictures are made smaller before they are segmented."""
    requests: int = 32
    """At a time, counting uploads that have not ended."""
    waiting: int = 8
    """Pictures that wait for the model or are with it; further ones are turned away."""
    upload_seconds: float = 30.0
    """For a whole upload."""
    answer_seconds: float = 60.0
    """For the model, waiting included."""
