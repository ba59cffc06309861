"""What is served, and how it is doing."""

from typing import Any

from fastapi import APIRouter, Request

from simple_flashinfer import __version__
from simple_flashinfer.server.service import Service, service_of
from simple_flashinfer.types import EngineDeadError

router = APIRouter()
PUBLIC_PATHS = {"/", "/health", "/version", "/v1/version"}  # for load balancers and the curious, without the API key


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "simple-flashinfer",
        "max_model_len": service.engine.info.max_model_len,
    }


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(http: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service_of(http))]}


@router.get("/v1/models/{name:path}")
async def model(name: str, http: Request) -> dict[str, Any]:
    service = service_of(http)
    service.check_model(name)
    return _model(service)


@router.get("/kv_cache")
async def kv_cache(http: Request) -> dict[str, int]:
    """In tokens; whole pages count."""
    engine = service_of(http).engine
    size, stats = engine.info.page_size, engine.stats
    return {
        "total_kv_cache": stats.num_pages * size,
        "free_kv_cache": stats.num_free_pages * size,
        "utilized_kv_cache": (stats.num_pages - stats.num_free_pages) * size,
    }


@router.get("/health")
async def health(http: Request) -> dict[str, Any]:
    """503 when the engine is dead."""
    engine = service_of(http).engine
    if engine.failure is not None:
        raise EngineDeadError(engine.failure)
    stats = engine.stats
    return {"status": "ok", "running": stats.num_running, "waiting": stats.num_waiting}


@router.get("/version")
@router.get("/v1/version", include_in_schema=False)
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/")
async def root(http: Request) -> dict[str, Any]:
    return {
        "name": "simple-flashinfer",
        "version": __version__,
        "model": service_of(http).config.model_name,
        "endpoints": [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/messages",
            "/v1/responses",
            "/v1/models",
            "/tokenize",
            "/detokenize",
            "/health",
            "/kv_cache",
            "/version",
            "/docs",
        ],
    }
