"""`POST /ludic/v1/adapter`: makes room for a trainer's adapter in the workers, and lets requests name it as their model.

An ASGI middleware behind the guard, so that only the trainer that has the lease reaches it. vLLM's own route for adapters wants
a folder that the server can read, and loads from there; here versions come over the weight transport (`vllm_lora`).

    {"rank": 16, "dtype": "bfloat16", "shapes": {"base_model.model....lora_A.weight": [16, 896], ...}}
    200 {"problem": ""}, or in words why the server cannot serve such an adapter
"""

import json
from typing import Any

from ludic.inference.server.generate_route import ASGIApp, Receive, Scope, Send, error_body, request_path, respond
from ludic.inference.wire import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH


class AdapterRoute:
    """ASGI middleware that answers `POST` of `ADAPTER_PATH`, and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or request_path(scope) != ADAPTER_PATH:
            await self._app(scope, receive, send)
        elif scope["method"] != "POST":
            await respond(send, 405, error_body(405, f"{ADAPTER_PATH} takes POST, not {scope['method']}"))
        else:
            body = (await receive()).get("body", b"")  # whole: the guard has read and checked it
            problem = await _open(scope["app"].state, body.decode())
            await respond(send, 200, json.dumps({"problem": problem}).encode())


async def _open(state: Any, specs_json: str) -> str:
    """Why a worker cannot serve such an adapter, "" where all can: then requests may name it."""
    served: dict[str, Any] = state.openai_serving_models.lora_requests
    problems: list[str] = await state.engine_client.collective_rpc("ludic_open_adapter", args=(specs_json,))
    problem = next((one for one in problems if one), "")
    if problem:
        served.pop(ADAPTER_NAME, None)
    else:
        from vllm.lora.request import LoRARequest

        # There is no such path: the worker has the adapter before any request names it.
        served[ADAPTER_NAME] = LoRARequest(lora_name=ADAPTER_NAME, lora_int_id=ADAPTER_ID, lora_path=ADAPTER_NAME)
    return problem
