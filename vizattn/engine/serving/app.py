"""The application: a page, `POST /predict`, `POST /attention`, `GET /health`."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, File, Query, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from vizattn.engine.evaluate import Trained
from vizattn.engine.serving.guard import Guard, error_response
from vizattn.engine.serving.limits import Limits
from vizattn.engine.serving.model import Busy, OneThread, ServedModel
from vizattn.errors import VizattnError

__all__ = ["create_app"]

Picture = Annotated[UploadFile, File(description="the file of a picture")]
TopK = Annotated[int, Query(ge=1, le=1000, description="classes to tell of")]


def create_app(
    trained: Trained, name: str, limits: Limits | None = None, hosts: Collection[str] | None = None
) -> ASGIApp:
    """An ASGI application about one model. Names and types that clients give their files are not looked at.

    Errors are JSON, ``{"error": message}``: 400 to 422 for what the client did, 503 when there is too much to do.

    Args:
        trained: What `load_trained` gives, on its device. Nothing else may use the model meanwhile.
        name: Of the model, for people.
        limits: Of requests.
        hosts: Names by which the server may be asked; None: any.

    Raises:
        VizattnError: A segmenter came without its recipe.
    """
    limits = limits or Limits()
    model = ServedModel(trained, limits)
    worker = OneThread(limits.waiting, limits.answer_seconds)
    page, policy = _page(name, model, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="vizattn", openapi_url=None, lifespan=lifespan)  # its page of documents needs the network

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        task = "segmentation" if model.predictor.segments else "classification"
        return {"status": "ok", "model": name, "task": task, "classes": trained.class_names}

    @app.post("/predict")
    async def predict(image: Picture, top_k: TopK = 5) -> dict[str, Any]:
        return await worker.run(model.predict, await image.read(), top_k)

    @app.post("/attention")
    async def attention(image: Picture) -> HTMLResponse:
        return HTMLResponse(await worker.run(model.attention, await image.read()))

    _answer_errors(app)
    return Guard(app, limits, hosts, policy)  # around the application, so that its last errors have the headers, too


def _answer_errors(app: FastAPI) -> None:
    """Each error as JSON."""

    @app.exception_handler(VizattnError)
    async def unusable(request: Request, error: VizattnError) -> Response:
        return error_response(422, f"{str(error)[:1].upper()}{str(error)[1:].rstrip('.')}.")

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return error_response(503, str(error))

    @app.exception_handler(MemoryError)
    async def memory(request: Request, error: MemoryError) -> Response:
        return error_response(503, "There is not enough memory for this picture.")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = first["loc"][-1]
        if where == "image":
            return error_response(422, "Send a file as the field 'image' of a form (multipart/form-data).")
        return error_response(422, f"{where}: {first['msg']}.")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(500, "The server failed at this request; what it said of it is where it was started.")


def _page(name: str, model: ServedModel, limits: Limits) -> tuple[str, str]:
    """The page, and the policy that lets its scripts run and no others."""
    here = files("vizattn.engine.serving")
    script = (here / "page.js").read_text("utf-8")
    viewer = (files("vizattn.engine") / "attention_page.js").read_text("utf-8")
    task = "segments" if model.predictor.segments else "classifies"
    values = {
        "STYLE": (here / "page.css").read_text("utf-8"),
        "SCRIPT": script,
        "NAME": html.escape(name),
        "TASK": f"{task} pictures; {len(model.predictor.class_names)} classes",
        "BYTES": str(limits.upload_bytes),
    }
    page = (here / "page.html").read_text("utf-8")
    for key, value in values.items():
        page = page.replace(f"@{key}@", value)
    hashes = " ".join(f"'sha256-{_hash(text)}'" for text in (script, viewer))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
