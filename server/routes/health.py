"""What probes, scrapers and people ask: /health, /ready, /metrics, /version, /docs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server.engine import SWAGGER_FILES, VLLM_VERSION, metrics_registry
from server.errors import ApiError, unavailable
from server.service import service

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while the process is alive; 503 once the engine has died and a restart is needed."""
    engine = service(request).engine
    if engine is not None and engine.client.errored:
        raise ApiError(503, "The engine has died; restart the service.", code="engine_dead")
    return {"status": "alive"}


@router.get("/ready")
async def ready(request: Request, pool: Literal["stable", "canary"] | None = None) -> dict[str, str]:
    """200 when the engine has just produced a token; 503 while it loads, hangs or drains.

    With `pool`, 503 also where this replica is not for those conversations, so that a router can tell them apart.
    """
    engine, follower = service(request).loaded(), service(request).follower
    if pool is not None and pool != (follower.pool if follower else "stable"):
        raise unavailable("This replica is for other conversations.", retry_after=10, code="other_pool")
    if engine.turnstile.closed:
        # Requests are taken, and answered when the activation ends, which is bounded. A probe would wait with them.
        return {"status": "activating", "checkpoint": engine.serving.id}
    if not await engine.answers():
        raise unavailable("The engine does not answer.", retry_after=10, code="engine_hung")
    return {"status": "ready", "checkpoint": engine.serving.id}


@router.get("/metrics")
async def metrics() -> Response:
    """vLLM's metrics and this service's own (`bimedix_*`), for Prometheus."""
    return Response(generate_latest(metrics_registry()), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def versions(request: Request) -> dict[str, str | None]:
    engine = service(request).engine
    return {
        "version": version("bimedix"),
        "vllm": VLLM_VERSION,
        "checkpoint": engine.serving.id if engine else None,
    }


def add_docs(app: FastAPI) -> None:
    """Serve /docs from the files vLLM carries, so that it works without a connection to anywhere."""
    app.mount("/docs/static", StaticFiles(directory=SWAGGER_FILES), name="docs-static")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=f"{app.title} API",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="data:,",
        )
