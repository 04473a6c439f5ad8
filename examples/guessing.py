"""A game of three turns that a small model of our own learns on a CPU: to find a number of seven by asking.

    uv run python examples/guessing.py --out-dir out_guessing

The model guesses, the environment answers `higher` or `lower`, and only a right guess within three turns is rewarded. A first
guess is right one time in seven; three turns are enough for all seven numbers, if each guess halves what is left. Nobody shows
the model that: its warm start imitates players who guess at random and forget three in ten of the things they are told.

The first part is the task (`ludic.task.environment.SeveralTurns`), the second its players and the policy that imitates them, the
third the script, as in `sums.py`. Training and evaluation have the same games, every number of every range: there are no others.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ludic import ChatMessage, ParseResult, Score, last_number_parser
from ludic.cli import run_script, say
from ludic.config import GRPOConfig
from ludic.config_file import RunParser
from ludic.flags import add_run_arguments
from ludic.run.task import Samples, Task
from ludic.run.training import train_from_flags

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_TURNS = 3
NUM_CHOICES = 2**MAX_TURNS - 1
"""Numbers that so many guesses can tell apart."""
NUM_RANGES = 4


@dataclass(frozen=True)
class Game:
    """One number to be found, from `low` to `low + NUM_CHOICES - 1`."""

    low: int
    secret: int


class Guessing:
    """The environment. It keeps nothing of a game: what was said is in `turns`."""

    def messages(self, sample: Game, /) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=f"my number is from {sample.low} to {sample.low + NUM_CHOICES - 1}")]

    def target(self, sample: Game, /) -> str:
        return str(sample.secret)

    async def next_turn(self, sample: Game, turns: Sequence[ChatMessage], /) -> str | None:
        guess = last_number_parser(turns[-1]["content"]).answer
        num_guesses = (len(turns) + 1) // 2
        if guess == str(sample.secret) or num_guesses == MAX_TURNS:
            return None
        return hint(guess, sample.secret)

    async def score(self, sample: Game, text: str, turns: Sequence[ChatMessage] = (), /) -> Score:
        parse: ParseResult = last_number_parser(text)
        correct = parse.answer == str(sample.secret)
        return Score(reward=float(correct), correct=correct, parse=parse, parts={"guesses": (len(turns) + 1) // 2})


def hint(guess: str | None, secret: int) -> str:
    if guess is None or not guess.isdecimal():
        return "what"
    return "higher" if int(guess) < secret else "lower"


def all_games() -> list[Game]:
    lows = range(1, 1 + NUM_RANGES * NUM_CHOICES, NUM_CHOICES)
    return [Game(low, secret) for low in lows for secret in range(low, low + NUM_CHOICES)]


# --- The players that the policy imitates at first ------------------------------------------------------------------

FORGETS = 0.3
"""How often a player guesses as if he had been told nothing."""
NUM_WARM_START_GAMES = 3_000


def play(game: Game, rng: random.Random) -> list[ChatMessage]:
    """The chat of one game: the prompt, and guesses of a player with the hints between them."""
    chat = Guessing().messages(game)
    low, high = game.low, game.low + NUM_CHOICES - 1
    for turn in range(MAX_TURNS):
        forgets = rng.random() < FORGETS
        guess = rng.randint(game.low, game.low + NUM_CHOICES - 1) if forgets else rng.randint(low, high)
        chat.append(ChatMessage(role="assistant", content=str(guess)))
        if guess == game.secret or turn == MAX_TURNS - 1:
            break
        chat.append(ChatMessage(role="user", content=hint(str(guess), game.secret)))
        low, high = (max(low, guess + 1), high) if guess < game.secret else (low, min(high, guess - 1))
    return chat


def guesses_of(chat: Sequence[ChatMessage]) -> list[tuple[list[ChatMessage], str]]:
    """Each guess of a chat as an example for the warm start: the chat before it, and the guess."""
    return [(list(chat[:at]), turn["content"]) for at, turn in enumerate(chat) if turn["role"] == "assistant"]


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Every word of the game is one token, and so is every number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|user|>", "<|assistant|>"]
    numbers = [str(number) for number in range(1, 1 + NUM_RANGES * NUM_CHOICES)]
    words = [*special, *["my", "number", "is", "from", "to", "higher", "lower", "what"], *numbers]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def build_policy(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """A Llama of 0.1 million parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        return LlamaForCausalLM(config)


def make_policy(args: argparse.Namespace, config: GRPOConfig, out_dir: Path) -> None:
    """Write a policy that plays as the players do, and point `--model` at it."""
    import torch

    from ludic import warm_start

    torch.set_num_threads(1)  # on matrices this small a second thread gains nothing
    rng, games = random.Random(config.seed), all_games()
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, config.seed)
    examples = [one for _ in range(NUM_WARM_START_GAMES) for one in guesses_of(play(rng.choice(games), rng))]
    say(f"warm start: a policy of our own imitates {len(examples):,} guesses of players who forget what they hear")
    losses = warm_start(
        policy, tokenizer, examples, max_seq_len=64, steps=len(examples) // 32, batch_size=32, learning_rate=2e-3
    )
    say(f"the last loss is {losses[-1]:.2f} nats a token. From here on it is GRPO.")
    args.model = str(out_dir / "guessing_policy")
    policy.save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)


# --- The script -----------------------------------------------------------------------------------------------------

OWN = "own"
FLAGS = {
    "--engine": "local",
    "--group-size": "16",
    "--rollouts-per-update": "448",
    "--concurrency": "448",
    "--train-steps": "120",
    "--lr": "3e-3",
    "--lr-schedule": "linear",
    "--warmup-steps": "2",
    "--max-seq-len": "64",
    "--max-tokens": "24",
    "--micro-token-budget": "2048",
    "--eval-limit": "0",
}
"""What the game learns with in its time; a flag on the command line comes first."""


def load_samples(args: argparse.Namespace) -> Samples[Game]:
    return Samples(train=all_games(), evaluation=all_games(), settings={"max_turns": MAX_TURNS})


TASK = Task(environment=Guessing(), load_samples=load_samples)


def build_parser() -> RunParser:
    parser = RunParser(description="Train a small model to find a number in three guesses.")
    group = parser.add_argument_group("task")
    group.add_argument("--model", default=OWN, help=f"hub name or folder (default: {OWN}, a policy that is made first)")
    add_run_arguments(parser)
    parser.set_flag_defaults(FLAGS | {"--eval-limit": str(len(all_games()))})
    return parser


async def main() -> int:
    args = build_parser().parse_args()
    made = Task(environment=Guessing(), load_samples=load_samples, make_policy=make_policy)
    summary = await train_from_flags(args, made if args.model == OWN else TASK)
    for one in summary.evaluations:
        say(f"after {one['step']} updates: {one['accuracy']:.1%} of {one['num_problems']} games won")
    return 0


if __name__ == "__main__":
    run_script("guessing.py", main)
