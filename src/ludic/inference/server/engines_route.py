"""`GET /ludic/v1/engines` of the first of several engines (`vllm_engines`): the ports of all, in order.

An ASGI middleware, behind the check of the API key. While an engine still loads, this route and `/health` answer 503 and say
how many do, so that the address is healthy once all engines are. An engine that is lost later changes neither: the trainer
goes on with the others. `/health?alone` is about the first engine itself.

    {"ports": [8000, 8001, 8002, 8003]}
"""

import asyncio
import json
import os
from urllib.parse import urlsplit

from ludic.inference.server.generate_route import ASGIApp, Receive, Scope, Send, error_body, request_path, respond
from ludic.inference.wire import ENGINES_PATH

ENGINES_VARIABLE = "LUDIC_SERVER_ENGINES"
"""In the environment of the first engine: the addresses of all, as JSON."""
ALONE = "alone"
LOOK_S = 5.0


class EnginesRoute:
    """ASGI middleware that answers `GET` of `ENGINES_PATH`, and of `/health` while an engine loads."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._urls: list[str] = json.loads(os.environ[ENGINES_VARIABLE])
        self._loading = set(self._urls[1:])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = request_path(scope) if scope["type"] == "http" and scope["method"] == "GET" else ""
        asks_health = path == "/health" and scope.get("query_string") != ALONE.encode()
        if path != ENGINES_PATH and not asks_health:
            await self._app(scope, receive, send)
        elif num_loading := await self._num_loading():
            words = f"{num_loading} of {len(self._urls)} engines still load: try again in a moment"
            await respond(send, 503, error_body(503, words))
        elif asks_health:
            await self._app(scope, receive, send)
        else:
            await respond(send, 200, json.dumps({"ports": [urlsplit(url).port for url in self._urls]}).encode())

    async def _num_loading(self) -> int:
        """The engines that were not healthy yet at any time."""
        urls = list(self._loading)
        healthy = await asyncio.gather(*map(_is_healthy, urls))
        self._loading -= {url for url, is_healthy in zip(urls, healthy, strict=True) if is_healthy}
        return len(self._loading)


async def _is_healthy(url: str) -> bool:
    address = urlsplit(url)
    try:
        async with asyncio.timeout(LOOK_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(b"GET /health HTTP/1.0\r\n\r\n")
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
