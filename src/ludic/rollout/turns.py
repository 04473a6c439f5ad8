"""Completions of one turn or of several: the model's turns are sampled, the environment's are tokenised once and appended.

    prompt --generate, the whole group--> turn 1 --next_turn--> environment's turn --generate--> turn 2 ... --> one Completion

A conversation is one sequence that only grows: what the model sampled stays as it was sampled, so that each later turn is a
request for one completion behind the tokens so far, which a server's prefix cache has already. A task of one turn
(`ludic.task.environment`) goes to the engine as it is.

Left out: stop strings inside a turn. A tool call is a whole turn of the model, which ends with its stop token; a text that ends
a turn would have to be searched in decoded tokens, and may end in the middle of one, which the model then never sampled.
"""

import asyncio
import contextlib
import contextvars
import itertools
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ludic.rollout.engine import InferenceEngine
from ludic.rollout.seeds import derive_seed
from ludic.task.environment import Environment, SeveralTurns, several_turns
from ludic.task.prompts import decode_completion, encode_turn
from ludic.types import ChatMessage, Completion, SamplingParams, Score, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")
ResultT = TypeVar("ResultT")

is_later_turn: contextvars.ContextVar[bool] = contextvars.ContextVar("is_later_turn", default=False)
"""Whether what a task asks the engine for goes on with a conversation, for those who count completions."""


class Conversations(Generic[SampleT]):
    """Draws the completions of an environment's prompts, and scores them. Used by training and evaluation alike."""

    def __init__(
        self, engine: InferenceEngine, environment: Environment[SampleT], tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self._engine = engine
        self._environment = environment
        self._several: SeveralTurns[SampleT] | None = several_turns(environment)
        self._tokenizer = tokenizer
        self._in_step = _InStep()
        self.go_in_step = self._several is not None and not engine.overlaps_training
        """Whether conversations wait for one another between their turns, and the weights for all of them."""

    async def generate(
        self, prompt_token_ids: Sequence[int], sample: SampleT, *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """`num_completions` completions of the prompt of `sample`, each with all its turns: [P] token ids in.

        `sampling.max_tokens` is for a whole conversation: a turn is cut to what the earlier ones left. Later turns draw from
        seeds that are derived from `sampling.seed`, the member's place and the turn's.

        Raises:
            ValueError: `next_turn` failed or returned no turn; one line that names the sample.
        """
        draw, several = self._engine.generate, self._several
        if several is None:
            return await draw(prompt_token_ids, num_completions=num_completions, sampling=sampling)
        with self._in_step.joined(num_completions) as tickets:
            completions = await draw(prompt_token_ids, num_completions=num_completions, sampling=sampling)
            return await all_or_first_failure(
                self._converse(several, sample, list(prompt_token_ids), completion, member, sampling, ticket)
                for member, (completion, ticket) in enumerate(zip(completions, tickets, strict=True))
            )

    async def scored(self, completions: Sequence[Completion], sample: SampleT) -> list[tuple[Completion, str, Score]]:
        """Each completion with its text and its score; all are scored at the same time."""
        if self._several is None:
            texts = [decode_completion(self._tokenizer, completion.token_ids) for completion in completions]
            scores = await asyncio.gather(*(self._environment.score(sample, text) for text in texts))
        else:
            texts = ["".join(turn.shown for turn in completion.turns) for completion in completions]
            several = self._several
            scores = await asyncio.gather(
                *(several.score(sample, one.turns[-1].text, _messages(one)) for one in completions)
            )
        return list(zip(completions, texts, scores, strict=True))

    async def _converse(
        self,
        environment: SeveralTurns[SampleT],
        sample: SampleT,
        prompt: list[int],
        first: Completion,
        member: int,
        sampling: SamplingParams,
        ticket: int,
    ) -> Completion:
        """The conversation that begins with the model's turn `first`."""
        is_later_turn.set(True)  # for this task, which is the conversation's
        conversation = replace(first, turns=(self._model_turn(first),))
        for number in itertools.count(1):
            if conversation.finish_reason == "length":
                break
            message = await _next_turn(environment, sample, _messages(conversation))
            if self.go_in_step:
                await self._in_step.wait(ticket)
            if message is None:
                break
            added = encode_turn(self._tokenizer, message, after=conversation.token_ids[-1])
            room = sampling.max_tokens - len(conversation.token_ids) - len(added)
            if room < 1:
                conversation = replace(conversation, finish_reason="length")
                break
            seed = None if sampling.seed is None else derive_seed(sampling.seed, member, number)
            (turn,) = await self._engine.generate(
                prompt + conversation.token_ids + added,
                num_completions=1,
                sampling=replace(sampling, max_tokens=room, seed=seed),
            )
            asked = Turn(role=message["role"], text=message["content"], num_tokens=len(added))
            conversation = _joined(conversation, asked, added, self._model_turn(turn), turn)
        self._in_step.leave([ticket])
        return conversation

    def _model_turn(self, sampled: Completion) -> Turn:
        text = decode_completion(self._tokenizer, sampled.token_ids)
        return Turn(role="assistant", text=text, num_tokens=len(sampled.token_ids))


def _joined(
    conversation: Completion, asked: Turn, added: Sequence[int], answer: Turn, sampled: Completion
) -> Completion:
    """`conversation` with the environment's turn, of the tokens `added`, and the model's turn after it."""
    logprobs = None
    if conversation.logprobs is not None and sampled.logprobs is not None:
        logprobs = [*conversation.logprobs, *[0.0] * len(added), *sampled.logprobs]
    return Completion(
        token_ids=[*conversation.token_ids, *added, *sampled.token_ids],
        logprobs=logprobs,
        finish_reason=sampled.finish_reason,
        policy_version=min(conversation.policy_version, sampled.policy_version),
        turns=(*conversation.turns, asked, answer),
    )


def _messages(conversation: Completion) -> list[ChatMessage]:
    return [ChatMessage(role=turn.role, content=turn.text) for turn in conversation.turns]


async def _next_turn(
    environment: SeveralTurns[SampleT], sample: SampleT, turns: Sequence[ChatMessage]
) -> ChatMessage | None:
    """What the environment says next.

    Raises:
        ValueError: it failed, or returned neither a turn nor None.
    """
    where = f"{type(environment).__name__}.next_turn, after {len(turns)} turns of the sample {sample!r:.200}"
    try:
        given: object = await environment.next_turn(sample, turns)
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    message = {"role": "user", "content": given} if isinstance(given, str) else given
    match message:
        case None:
            return None
        case {"role": "user" | "system" | "tool" as role, "content": str(content)}:
            return ChatMessage(role=role, content=content)
    raise ValueError(
        f"{where}: a turn is a text, a message of the role user, system or tool, or None for the end, not {given!r:.200}"
    )


class _InStep:
    """Lets conversations go on together, in the order in which they began, whatever an environment's answers take.

    For an engine in this process, whose batches are what is asked for at a time: it repeats bit for bit only if that does not
    depend on a tool's speed.
    """

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._going: set[int] = set()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    @contextlib.contextmanager
    def joined(self, count: int) -> Iterator[list[int]]:
        """The tickets of `count` conversations, which are over at the end."""
        tickets = list(itertools.islice(self._tickets, count))
        self._going.update(tickets)
        try:
            yield tickets
        finally:
            self.leave(tickets)

    async def wait(self, ticket: int) -> None:
        """Until every conversation that is not over waits here."""
        turn = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        self._release()
        await turn

    def leave(self, tickets: Iterable[int]) -> None:
        self._going.difference_update(tickets)
        for ticket in tickets:
            self._waiting.pop(ticket, None)
        self._release()

    def _release(self) -> None:
        if self._going <= self._waiting.keys():
            waiting, self._waiting = self._waiting, {}
            for ticket in sorted(waiting):  # a future wakes its task in this order
                if not waiting[ticket].done():
                    waiting[ticket].set_result(None)


async def all_or_first_failure(work: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """Do all of `work` at the same time. The first failure cancels the rest, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        failure = failures.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise failure  # here, where it keeps its own cause
