"""The model behind the server: pictures go in as bytes, answers come out ready to be sent."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from vizattn.engine.attend import attention_view
from vizattn.engine.attention_page import attention_html
from vizattn.engine.evaluate import Trained
from vizattn.engine.pictures import index_image, overlay
from vizattn.engine.predict import FIRST_OF_SEVERAL, Predictor, memory_errors, read_image
from vizattn.engine.report import png_url
from vizattn.engine.serving.limits import Limits

__all__ = ["Busy", "OneThread", "ServedModel"]

Answer = TypeVar("Answer")

#: Whose decoders are tried; some others start programs, or have no check of their own.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


class ServedModel:
    """Answers about single pictures; one call at a time, as recording attention is not safe beside another forward.

    Args:
        trained: What `load_trained` gives.
        limits: Of the pictures.

    Raises:
        VizattnError: A segmenter came without its recipe.
    """

    def __init__(self, trained: Trained, limits: Limits) -> None:
        self.trained = trained
        self.limits = limits
        self.predictor = Predictor(trained)

    def predict(self, data: bytes, top_k: int) -> dict[str, Any]:
        """The likeliest classes of a picture, or its segments.

        Returns:
            `width`, `height` (pixels, upright), `notes` (what else is to be known), `predictions` (best first: `class`
            and `probability`; by a segmenter `share` of the pixels and `colour`, red, green, blue), and of a segmenter
            `mask` and `overlay`, addresses that hold a PNG.

        Raises:
            VizattnError: The picture cannot be read.
        """
        image = self._read(data)
        notes = [FIRST_OF_SEVERAL] if image.info.get("first_of_several") else []
        answer: dict[str, Any] = {"width": image.width, "height": image.height, "notes": notes}
        if not self.predictor.segments:
            (best,) = self.predictor.classify([self.predictor.transform(image)], top_k)
            return {**answer, "predictions": best}
        side = self.limits.segmented_side
        if max(image.size) > side:
            image.thumbnail((side, side))
            notes.append(f"made smaller, to {image.width} x {image.height} pixels")
        mask, shares = self.predictor.segment(image, top_k)
        colours = dict(zip(self.predictor.class_names, self.predictor.palette))
        return {
            **answer,
            "predictions": [{**best, "colour": list(colours[best["class"]])} for best in shares],
            "mask": png_url(index_image(mask, self.predictor.palette)),
            "overlay": png_url(overlay(image, mask, self.predictor.palette)),
        }

    def attention(self, data: bytes) -> str:
        """A page by itself to explore the attention on a picture.

        Raises:
            VizattnError: The picture cannot be read, or the model's attention is not known.
        """
        image = self._read(data)
        with memory_errors():
            return attention_html(attention_view(self.trained, image, "the picture"))

    def _read(self, data: bytes) -> Image.Image:
        Image.init()
        formats = tuple(name for name in FORMATS if name in Image.OPEN)
        return read_image(io.BytesIO(data), max_pixels=self.limits.pixels, formats=formats)


class Busy(Exception):
    """The line is full, or the answer took too long."""


class OneThread:
    """Runs functions one after the other, with a bounded line before it.

    Args:
        places: Of the line, with the one that runs.
        seconds: To wait for an answer, the time in the line included.
    """

    def __init__(self, places: int, seconds: float) -> None:
        self.seconds = seconds
        self._places = threading.BoundedSemaphore(places)
        self._pool = ThreadPoolExecutor(1, "model")

    async def run(self, function: Callable[..., Answer], *args: Any) -> Answer:
        """What `function` gives.

        Raises:
            Busy: There is no place, or no answer in time. What has begun then keeps its place until it ends.
        """
        if not self._places.acquire(blocking=False):
            raise Busy("Too many pictures are waiting; try again in a moment.")
        future = self._pool.submit(function, *args)
        future.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.seconds)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise Busy(f"The model took longer than {self.seconds:g} seconds; try a smaller picture.") from error

    def close(self) -> None:
        """End after what is running; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
