"""What is asked of a server before it is used: is it the one that this run needs, and whose is it?

Each way in which the two sides can differ is an error of its own, with what to do about it. All calls block; they are made
before a run, after a server was lost, and by `ludic.doctor`.
"""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ludic.commands import server_command
from ludic.inference import wire
from ludic.inference.client.server_control import ServerControl
from ludic.inference.wire import LEASE_S, TRAINER_PATH
from ludic.rollout.errors import (
    EngineError,
    RouteMissingError,
    ServerInUseError,
    ServerLostError,
    ServerMismatchError,
    ServerRestartedError,
    ServerUnauthorizedError,
    ServerUnreachableError,
)
from ludic.storage.identity import describe
from ludic.task.prompts import encode_prompt, is_plain_text, renders_date
from ludic.types import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOOK_S = 15.0
"""Deadline of a question that a healthy server answers at once."""
RELEASE_S = 3.0
"""Of a last word, which a server that is gone must not make an ending run wait for."""
PAUSED_LOOKS = 5
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank, 0.26 to 0.33."""

_PROBE_CHAT: list[ChatMessage] = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is 12 + 7?  Überraschung: \\boxed{19} <|x|>"},
]
_PROBE_TEXT = "Tom has 3 boxes of 12 eggs. He sells 5, so 3 * 12 - 5 = 31 are left: \\boxed{31}. Überraschung!"

_PASS_ON = (ServerLostError, ServerUnauthorizedError, ServerInUseError)
"""Errors that end the handshake: the server is gone, or is not to be used by this caller."""


def start_command(base_url: str, model: str) -> str:
    """The command that starts the server which should be at `base_url`, or behind the proxy there."""
    address = urlsplit(base_url)
    if address.scheme != "http" or address.path.strip("/"):  # a proxy: the server itself is elsewhere
        return server_command(model)
    return server_command(model, host=address.hostname or "127.0.0.1", port=address.port or 80)


def nothing_listens(base_url: str, model: str) -> ServerUnreachableError:
    """The error of a run that finds no server."""
    command = start_command(base_url, model)
    return ServerUnreachableError(
        f"nothing listens at {base_url}: start the server with `{command}`, or pass --start-server"
    )


def served_model(control: ServerControl, model: str) -> dict[str, Any]:
    """What `/v1/models` says of `model`.

    Raises:
        ServerUnreachableError: nothing listens there; names the command that starts a server.
        ServerMismatchError: the server serves something else.
    """
    try:
        answer = control.ask("GET", "/v1/models", "data", timeout_s=LOOK_S)
    except ServerUnreachableError as error:
        raise nothing_listens(control.base_url, model) from error
    models: list[dict[str, Any]] = answer["data"]
    for served in models:
        if served["id"] == model:
            return served
    names = ", ".join(str(served["id"]) for served in models)
    raise ServerMismatchError(
        f"the server at {control.base_url} serves {names}, not {model}: restart it with --model {model}, "
        f"or train the model that it serves"
    )


def check_context(served: Mapping[str, Any], max_seq_len: int, longrope_switch: int | None = None) -> None:
    """Compare the server's context with the trainer's, both in tokens.

    Args:
        longrope_switch: the context beyond which the model's RoPE takes other frequencies (`rope.longrope_switch`).

    Raises:
        ServerMismatchError: the server's is shorter than `max_seq_len`, or beyond a switch that `max_seq_len` is not.
    """
    context = served.get("max_model_len")
    if context is None:
        return
    if longrope_switch is not None and max_seq_len <= longrope_switch < context:
        raise ServerMismatchError(
            f"the server's context is {context} tokens: beyond {longrope_switch} it rotates positions (longrope) in another way "
            f"than training with --max-seq-len {max_seq_len}: restart it with --max-model-len {max_seq_len}"
        )
    if context < max_seq_len:
        raise ServerMismatchError(
            f"the server's context is {context} tokens, shorter than --max-seq-len {max_seq_len}: "
            f"restart it with --max-model-len {max_seq_len} or lower --max-seq-len"
        )


def check_tokenizer(control: ServerControl, model: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Compare how both sides tokenise a text; the probe holds digits, markup and a non-ASCII word.

    Raises:
        ServerMismatchError: the ids differ.
    """
    request = {"model": model, "prompt": _PROBE_TEXT, "add_special_tokens": False}
    theirs = control.ask("POST", "/tokenize", "tokens", json_body=request)["tokens"]
    ours = tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)
    if theirs != ours:
        raise ServerMismatchError(
            f"the server's tokenizer is not the trainer's (a test sentence gives {len(theirs)} tokens there, "
            f"{len(ours)} here, and the ids differ): serve and train the same model folder"
        )


def check_chat_template(control: ServerControl, model: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Compare how both sides tokenise a chat. Nothing to compare is a warning: prompts are tokenised on this side.

    Where the template renders the date, the server's is that of its own clock and time zone, and the prompts' own one does
    not matter: they are rendered on this side.

    Raises:
        ServerMismatchError: the ids differ.
    """
    if tokenizer.chat_template is None or is_plain_text(tokenizer):
        return
    request = {"model": model, "messages": _PROBE_CHAT, "add_generation_prompt": True}
    asked_at = datetime.now()
    try:
        answer = control.ask("POST", "/tokenize", "tokens", json_body=request)
    except ServerLostError:
        raise
    except EngineError:
        logger.warning(
            "the server's chat template could not be compared with the trainer's; prompts are tokenised here"
        )
        return
    moments: list[datetime | None] = [None]
    if renders_date(tokenizer):
        zones = [timedelta(minutes=15 * quarters) for quarters in range(-104, 105)]  # as far as 26 hours apart
        moments = [moment + zone for moment in (asked_at, datetime.now()) for zone in zones]
    if all(answer["tokens"] != encode_prompt(tokenizer, _PROBE_CHAT, moment=moment) for moment in moments):
        raise ServerMismatchError(
            "the server's chat template is not the trainer's (a test chat gives other token ids): "
            "serve and train the same model folder, or give both the same --chat-template"
        )


def has_generate_route(control: ServerControl) -> bool:
    """Whether the server has ludic's route for rollouts, in this client's protocol."""
    try:
        answer = control.request("GET", wire.PATH, timeout_s=LOOK_S)
    except RouteMissingError:  # plain vLLM
        return False
    return bool(answer == {"protocol": wire.PROTOCOL})


def engines_behind(control: ServerControl) -> list[str]:
    """The addresses of all engines of the server's command, its own first; its own alone where it is the only one.

    Raises:
        EngineError: some of them still load.
    """
    try:
        ports = control.ask("GET", wire.ENGINES_PATH, "ports", timeout_s=LOOK_S)["ports"]
    except RouteMissingError:  # one engine, or plain vLLM
        return [control.base_url]
    address = urlsplit(control.base_url)
    if address.scheme != "http" or address.path.strip("/") or address.port != ports[0]:  # a proxy or a tunnel
        logger.warning(
            "the server behind %s has %d engines on ports %s, and only the first is used: give the address of each with --server",
            control.base_url, len(ports), ", ".join(map(str, ports)),
        )  # fmt: skip
        return [control.base_url]
    there = [ports[0], *(port for port in ports[1:] if _listens(address.hostname or "", port))]
    if lost := [port for port in ports if port not in there]:
        logger.warning(
            "of the %d engines behind %s nothing listens on %s: they are left out (lost, or not reached through a tunnel)",
            len(ports), control.base_url, ", ".join(map(str, lost)),
        )  # fmt: skip
    host = address.netloc.rpartition(":")[0]
    return [f"http://{host}:{port}" for port in there]


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=LOOK_S).close()
    except OSError:
        return False
    return True


def stays_paused(control: ServerControl) -> bool:
    """Whether the server stays paused for longer than the sync of a running trainer takes."""
    for attempt in range(PAUSED_LOOKS):
        if attempt:
            time.sleep(1.0)
        try:
            answer = control.ask("GET", "/is_paused", "is_paused", timeout_s=LOOK_S)
        except RouteMissingError:  # a server without RL routes cannot be paused
            return False
        if not answer["is_paused"]:
            return False
    return True


def weight_sync_info(control: ServerControl, model: str) -> dict[str, Any]:
    """What the server's worker says of itself (`ServerControl.server_info`), once it is fit for weight syncs.

    Raises:
        ServerMismatchError: the server has no RL routes, or its settings would make training wrong.
    """
    command = start_command(control.base_url, model)
    try:
        control.request("GET", "/is_paused", timeout_s=LOOK_S)
    except RouteMissingError as error:
        raise ServerMismatchError(
            f"the server at {control.base_url} has no RL routes, so it cannot take new weights (it is plain vLLM, or was started "
            f"with --no-training): start it with `{command}`"
        ) from error
    try:
        info = control.server_info()
    except _PASS_ON:
        raise
    except EngineError as error:
        raise ServerMismatchError(
            f"the server at {control.base_url} runs vLLM without ludic's worker extension, which proves weight syncs: "
            f"start it with `{command}`"
        ) from error
    logprobs_mode = info.get("logprobs_mode", "processed_logprobs")
    if logprobs_mode != "processed_logprobs":
        raise ServerMismatchError(
            f"the server returns {logprobs_mode}: training needs the log-probs of the distribution that was sampled "
            "from; start it with --logprobs-mode processed_logprobs (the default of ludic.inference.vllm_server)"
        )
    if not info.get("transfer_backend"):
        raise ServerMismatchError(
            f"the server at {control.base_url} was started without weight transfer: start it with `{command}`"
        )
    return info


def check_head_dtype(info: Mapping[str, Any], fp32_head: bool) -> None:
    """Warn where the server rounds logits and the trainer does not, or the other way round.

    Args:
        info: of `weight_sync_info`.
        fp32_head: whether the trainer keeps its logits in fp32.
    """
    theirs = info.get("head_dtype", info["dtype"])
    ours = "float32" if fp32_head else info["dtype"]
    if theirs != ours:
        other = "--no-fp32-head" if fp32_head else "--fp32-head"
        logger.warning(
            "the server's LM head gives logits in %s and the trainer's in %s, so log-probs differ more than they need to: "
            "restart the server with --hf-overrides '{\"head_dtype\": \"%s\"}', or train with %s",
            theirs, ours, ours, other,
        )  # fmt: skip


def check_adapters(control: ServerControl, info: Mapping[str, Any], rank: int) -> None:
    """Is the server one for an adapter of this rank, or with 0, for whole models?

    Args:
        info: of `weight_sync_info`.

    Raises:
        ServerMismatchError: it is not; one line.
    """
    largest = info.get("max_lora_rank", 0)
    if rank and not largest:
        raise ServerMismatchError(
            f"the server at {control.base_url} takes no adapters: start it with --enable-lora --max-lora-rank "
            f"{largest_rank(rank)}, or train with --lora-sync merged"
        )
    if rank > largest:
        raise ServerMismatchError(
            f"the server at {control.base_url} takes adapters of rank {largest} at most, and --lora-rank is {rank}: start it "
            f"with --max-lora-rank {largest_rank(rank)}, or train with --lora-sync merged"
        )
    if largest and not rank:
        raise ServerMismatchError(
            f"the server at {control.base_url} was started with --enable-lora, and then vLLM takes no whole models: restart it "
            "without, or train an adapter with --lora-rank N --lora-sync adapter"
        )


def largest_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM's that has room for `rank`, which is at most 512."""
    return next((one for one in LORA_RANKS if one >= rank), LORA_RANKS[-1])


# -- whose server it is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What a server says of itself, beside whose it is."""

    is_ours: bool
    """Whether it is ludic's, which leases itself and says whose its weights are."""
    weights: Mapping[str, Any] | None
    """The owner of its weights, as `server_guard` reports it; None for the weights that it was started with."""

    @property
    def policy_version(self) -> int:
        """The update that made the weights; 0 for those that it was started with, or that are not proven."""
        return int(self.weights["policy_version"]) if self.weights is not None and self.weights["proven"] else 0

    @property
    def has_adapter(self) -> bool:
        """Whether a trainer's adapter makes the policy of the weights, also while it is replaced."""
        return self.weights is not None and bool(self.weights.get("adapter"))


def server_state(control: ServerControl) -> ServerState:
    """Ask the server for its state. From then on `control` has its token, and takes no answer of another start.

    A token of this start, and its lease, stay; one of another start is given up.

    Raises:
        ServerMismatchError: it speaks another protocol of ludic.
        ServerInUseError: the lease was lost.
    """
    try:
        answer = control.ask("GET", TRAINER_PATH, timeout_s=LOOK_S)
    except ServerRestartedError:
        if control.token is None:
            raise
        control.token = None
        return server_state(control)
    except RouteMissingError:  # plain vLLM, or --no-training
        return ServerState(is_ours=False, weights=None)
    if answer.get("protocol") != wire.PROTOCOL:
        raise ServerMismatchError(
            f"the server at {control.base_url} speaks protocol {answer.get('protocol', '2 or older')} of ludic, and this side "
            f"{wire.PROTOCOL}: start both from the same version of ludic"
        )
    control.token = str(answer["token"])
    return ServerState(is_ours=True, weights=answer.get("weights"))


def claim(control: ServerControl, identity: Mapping[str, Any], *, takes_over: int | None = None) -> None:
    """Claim the lease of the server, if `control` has not got it: its token is the lease's from then on.

    A claim that is made again with the same identity is the same claim.

    Raises:
        ServerInUseError: another trainer has the lease.
    """
    body = {"identity": dict(identity), "takes_over": takes_over}
    with contextlib.suppress(RouteMissingError):  # vLLM with ludic's worker extension alone leases nothing
        control.token = str(control.ask("POST", TRAINER_PATH, "token", json_body=body, timeout_s=LOOK_S)["token"])


def keep(control: ServerControl) -> None:
    """Keep the lease of the server, and see whether it is still there.

    Raises:
        ServerInUseError: the lease was lost.
        ServerRestartedError: it was started again.
    """
    with contextlib.suppress(RouteMissingError):  # as above
        control.request("GET", TRAINER_PATH, timeout_s=LOOK_S)
        if control.token is None:
            raise ServerRestartedError(
                f"another server was started at {control.base_url}: the one before leased nothing"
            )


def holder(control: ServerControl) -> dict[str, Any] | None:
    """The trainer that has the lease: {"lease", "identity", "seconds_since_seen"}; None where none has."""
    answer = control.ask("GET", TRAINER_PATH, timeout_s=LOOK_S)
    found: dict[str, Any] | None = answer.get("holder")
    return found


def claim_or_wait(
    control: ServerControl,
    identity: Mapping[str, Any],
    *,
    is_alive: Callable[[Mapping[str, Any]], bool | None],
    say: Callable[[str], None],
) -> None:
    """`claim`, also from a trainer that is dead: at once where that can be seen, else when its lease runs out.

    Args:
        is_alive: whether the trainer of an identity still runs; None where that cannot be known from here.

    Raises:
        ServerInUseError: the other one lives, with its identity.
    """
    deadline: float | None = None
    while True:
        try:
            return claim(control, identity)
        except ServerInUseError:
            other = holder(control)
            if other is None:  # it has just let go
                continue
            alive = is_alive(other["identity"])
            if alive is False:
                say("the trainer that had the lease of the server is dead; taking the server over")
                return claim(control, identity, takes_over=other["lease"])
            if alive or (deadline is not None and time.monotonic() > deadline):
                raise
            if deadline is None:
                deadline = time.monotonic() + LEASE_S + LOOK_S
                say(
                    f"the server is leased to {describe(other['identity'])}, of another machine; waiting whether it is gone"
                )
            time.sleep(2.0)


def release(control: ServerControl) -> None:
    """Give the lease back, so that the next trainer need not wait for its end."""
    try:
        if control.has_lease:
            control.request("DELETE", TRAINER_PATH, timeout_s=RELEASE_S)
    finally:
        control.token = None
