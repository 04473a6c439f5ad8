r"""What `train_gsm8k.py --demo` trains on: word problems, a tokenizer and a tiny policy, all of our own making.

Nothing is downloaded. `build_demo` writes an ordinary model folder and two ordinary JSONL files in GSM8K's format, so
that the training script runs on them as it would on the real thing: same trainer, same environment, same reward.

The problems take one to three steps of arithmetic. The policy is *warm-started* by imitating worked solutions of hasty
students: every step that they write is right, but of the problems with more than one step they finish only some, and
stop after the first step of the others, whose result they box. Greedy decoding of the imitator is therefore hasty too, while
sampling still shows a finished solution now and then. What GRPO has to find, from the reward of a right final answer
alone, is to go on until the question is answered, and to get every step right. The completions grow longer while it
does.

What it leaves out: any supervision after the warm start, and any problem of the held-out split during either.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.types import ChatMessage

if TYPE_CHECKING:  # imported where they are used: the demo's flags are checked before
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DEMO_FLAGS: dict[str, str] = {
    "--engine": "local",
    "--system-prompt": "",
    "--group-size": "8",
    "--rollouts-per-update": "256",
    "--concurrency": "256",
    "--train-steps": "50",
    "--lr": "5e-4",
    "--lr-schedule": "linear",
    "--warmup-steps": "3",
    "--max-tokens": "40",
    "--max-seq-len": "96",
    "--micro-token-budget": "2048",
    "--eval-limit": "256",
}
"""Flags of `train_gsm8k.py` with which the demo learns in its time; a flag given by the user comes first."""

NUM_THREADS = 1
"""For `torch.set_num_threads`: on matrices this small a second thread gains nothing, and beside other work it costs."""

NUM_TRAIN_PROBLEMS = 4_000
NUM_TEST_PROBLEMS = 256
NUM_WARM_START_PROBLEMS = 33_000
BATCH_SIZE, LEARNING_RATE = 16, 2e-3
"""Of the warm start."""
FINISHED_SHARE = 0.42
"""How many of the students' solutions to problems of several steps get to the end."""

# fmt: off
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Grace", "Hugo",
         "Iris", "Jack", "Kate", "Liam", "Mia", "Noah", "Olive", "Paul")
ITEMS = ("apples", "beads", "books", "cards", "coins", "cookies", "eggs",
         "flowers", "marbles", "pencils", "plums", "shells", "stamps", "stickers")
# fmt: on
_LARGEST_RESULT = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of problem. Formulas name operands a to d and the results of earlier steps, x and y."""

    formulas: tuple[str, ...]
    wordings: tuple[str, ...]


_KINDS = (
    _Kind(
        formulas=("A+b",),
        wordings=(
            "{name} has {A} {items} and {friend} has {b} {items}. How many {items} do they have together?",
            "{name} had {A} {items} and then found {b} more. How many {items} does {name} have now?",
        ),
    ),
    _Kind(
        formulas=("A-b",),
        wordings=(
            "{name} had {A} {items} and gave {b} of them to {friend}. How many {items} does {name} have left?",
            "There were {A} {items} on a table. {name} took {b} of them. How many {items} are still there?",
        ),
    ),
    _Kind(
        formulas=("a*b",),
        wordings=(
            "{name} has {a} boxes with {b} {items} in each box. How many {items} does {name} have?",
            "One bag holds {b} {items}. How many {items} does {name} have in {a} bags?",
        ),
    ),
    _Kind(
        formulas=("a+b", "x-c"),
        wordings=(
            "{name} has {a} {items}, finds {b} more and gives {c} to {friend}. How many {items} does {name} have left?",
            "{name} had {a} {items} and {friend} had {b}. Together they sold {c} {items}. How many are left?",
        ),
    ),
    _Kind(
        formulas=("a*b", "x-c"),
        wordings=(
            "{name} buys {a} boxes with {b} {items} in each box and loses {c} {items}. How many {items} are left?",
            "There are {a} bags of {b} {items}. {friend} takes {c} {items} away. How many {items} are still there?",
        ),
    ),
    _Kind(
        formulas=("a*b", "x+c"),
        wordings=(
            "{name} has {a} bags of {b} {items}, and {c} more {items}. How many {items} does {name} have in all?",
            "{name} fills {a} boxes with {b} {items} each. Then {friend} brings {c} {items}. How many are there now?",
        ),
    ),
    _Kind(
        formulas=("a+b", "a+x"),
        wordings=(
            "{name} has {a} {items}. {friend} has {b} more {items} than {name}. How many do they have together?",
            "On Monday {name} sold {a} {items}, and on Tuesday {b} more than on Monday. How many did {name} sell?",
        ),
    ),
    _Kind(
        formulas=("a*b", "a+x"),
        wordings=(
            "{name} has {a} {items}. {friend} has {b} times as many {items}. How many do they have together?",
            "On Monday {name} sold {a} {items}, and on Tuesday {b} times as many. How many did {name} sell?",
        ),
    ),
    _Kind(
        formulas=("a-b", "x*c"),
        wordings=(
            "{name} has {a} {items}, loses {b} and sells the others for {c} dollars each. How many dollars is that?",
            "{name} had {a} boxes and gave {b} to {friend}. Each holds {c} {items}. How many {items} are left?",
        ),
    ),
    _Kind(
        formulas=("a+b", "x+c", "y-d"),
        wordings=(
            "{name} had {a} {items}, found {b}, bought {c} and gave {d} to {friend}. How many {items} are left?",
            "{name} picked {a} {items}, then {b} and then {c} more, and lost {d} of them. How many {items} are left?",
        ),
    ),
    _Kind(
        formulas=("a*b", "x+c", "y-d"),
        wordings=(
            "{name} has {a} bags of {b} {items}, finds {c} more and gives {d} to {friend}. How many {items} are left?",
            "{name} buys {a} boxes of {b} {items}. {friend} brings {c} and takes {d}. How many are there now?",
        ),
    ),
    _Kind(
        formulas=("a-b", "x*c", "y+d"),
        wordings=(
            "{name} had {a} bags of {c} {items}. {friend} took {b} bags and left {d} {items}. How many are there now?",
            "{name} has {a} {items}, keeps {b}, sells the rest for {c} dollars each and gets {d} more. How much is it?",
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One word problem with its worked steps.

    Example:
        Problem(question="Ada has 3 boxes ...", steps=("3*4=12", "12-5=7"), results=(12, 7), key=(4, 3, 4, 5))
    """

    question: str
    steps: tuple[str, ...]
    results: tuple[int, ...]
    key: tuple[int, ...]
    """Kind and operands. Problems with equal keys differ in words only, and never stand on both sides of a split."""

    @property
    def row(self) -> dict[str, str]:
        """The problem as a row of GSM8K."""
        return {"question": self.question, "answer": "\n".join((*self.steps, f"#### {self.results[-1]}"))}

    def solution(self, num_steps: int | None = None) -> str:
        r"""The response format: the first `num_steps` steps (all if None), and `\boxed{}` around the last result."""
        num_steps = len(self.steps) if num_steps is None else num_steps
        return "\n".join((*self.steps[:num_steps], f"\\boxed{{{self.results[num_steps - 1]}}}"))


def problems(rng: random.Random) -> Iterator[Problem]:
    """Draw problems without end. Every number and result is between 1 and 99, so that answers are plain integers."""
    while True:
        index = rng.randrange(len(_KINDS))
        kind = _KINDS[index]
        letters = sorted(set(re.findall("[Aa-d]", " ".join(kind.formulas))))
        operands = {letter: rng.randint(10, 80) if letter == "A" else rng.randint(2, 9) for letter in letters}
        steps, results = _work_out(kind.formulas, operands)
        factor_values = [int(value) for value in re.findall(r"\d+(?=\*)|(?<=\*)\d+", " ".join(steps))]
        if not all(1 <= result <= _LARGEST_RESULT for result in results) or max(factor_values, default=0) > 9:
            continue
        name, friend = rng.sample(NAMES, 2)
        question = rng.choice(kind.wordings).format(name=name, friend=friend, items=rng.choice(ITEMS), **operands)
        yield Problem(question=question, steps=steps, results=results, key=(index, *operands.values()))


def _work_out(formulas: Sequence[str], operands: dict[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The written steps, e.g. `12-5=7`, and their results."""
    values, steps, results = dict(operands), [], []
    for formula, letter in zip(formulas, "xyz", strict=False):
        left, operator, right = values[formula[0]], formula[1], values[formula[2]]
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        values[letter] = result
        steps.append(f"{left}{operator}{right}={result}")
        results.append(result)
    return tuple(steps), tuple(results)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoProblems:
    """Three sets of problems. None of the held-out `test` shares its kind and operands with any other."""

    train: list[Problem]
    test: list[Problem]
    warm_start: list[Problem]


def draw_problems(seed: int, *, num_train: int, num_test: int, num_warm_start: int) -> DemoProblems:
    """Draw the splits. The held-out problems come first; what the others draw of them is thrown away."""
    stream = problems(random.Random(f"demo problems {seed}"))
    test: dict[tuple[int, ...], Problem] = {}
    while len(test) < num_test:
        problem = next(stream)
        test.setdefault(problem.key, problem)
    train: dict[str, Problem] = {}
    while len(train) < num_train + num_warm_start:
        problem = next(stream)
        if problem.key not in test:
            train.setdefault(problem.question, problem)
    others = list(train.values())
    return DemoProblems(train=others[:num_train], test=list(test.values()), warm_start=others[num_train:])


SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Sequence[str], *, vocab_size: int = 640) -> "PreTrainedTokenizerFast":
    r"""A byte-level BPE tokenizer trained on `texts`: it can write any text, and each digit is a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\\boxed\{|\d| ?[A-Za-z]+|[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_policy(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """A Llama of 0.1 million parameters with random weights, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: smaller ones than that vLLM's attention on the CPU does not have
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        policy = LlamaForCausalLM(config)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    return policy


def student_solution(problem: Problem, rng: random.Random) -> str:
    """What a hasty student hands in: right as far as it goes, and seldom finished if there are several steps."""
    num_steps = len(problem.steps)
    if num_steps > 1 and rng.random() >= FINISHED_SHARE:
        num_steps = 1
    return problem.solution(num_steps)


def student_examples(practice: Sequence[Problem], seed: int) -> list[tuple[list[ChatMessage], str]]:
    """What the policy imitates: the prompts as the environment puts them, without a system prompt, and students' solutions."""
    rng = random.Random(f"demo students {seed}")
    return [([ChatMessage(role="user", content=p.question)], student_solution(p, rng)) for p in practice]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSetup:
    """Where the demo's parts lie, and what it took to make them."""

    model_dir: Path
    train_path: Path
    test_path: Path
    num_parameters: int
    num_train: int
    num_test: int
    num_warm_start: int
    """Students' solutions that the policy was warm-started on."""
    warm_start_s: float
    """Seconds of supervised training, which is no part of GRPO."""


def build_demo(
    out_dir: str | Path,
    seed: int = 0,
    *,
    num_train: int = NUM_TRAIN_PROBLEMS,
    num_test: int = NUM_TEST_PROBLEMS,
    num_warm_start: int = NUM_WARM_START_PROBLEMS,
    on_progress: Callable[[str], None] | None = None,
) -> DemoSetup:
    """Write `model/`, `train.jsonl` and `test.jsonl` into `out_dir`. The same seed writes the same files."""
    import torch

    from ludic.train.warm_start import warm_start

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    drawn = draw_problems(seed, num_train=num_train, num_test=num_test, num_warm_start=num_warm_start)
    train_path, test_path, model_dir = out_dir / "train.jsonl", out_dir / "test.jsonl", out_dir / "model"
    for path, rows in ((train_path, drawn.train), (test_path, drawn.test)):
        path.write_text("".join(json.dumps(problem.row) + "\n" for problem in rows), encoding="utf-8")
    tokenizer = build_tokenizer([f"{p.question}\n{p.solution()}" for p in drawn.train])
    policy = build_policy(tokenizer, seed)
    num_steps = max(1, num_warm_start // BATCH_SIZE)

    def progress(step: int, loss: float) -> None:
        if on_progress is not None and step % 20 == 0:
            on_progress(f"warm start: step {step} of {num_steps}, loss {loss:.3f}")

    start_s = time.perf_counter()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        warm_start(
            policy,
            tokenizer,
            student_examples(drawn.warm_start, seed),
            max_seq_len=int(DEMO_FLAGS["--max-seq-len"]),
            steps=num_steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            micro_token_budget=int(DEMO_FLAGS["--micro-token-budget"]),
            seed=seed,
            on_step=progress,
        )
    finally:
        torch.set_num_threads(num_threads)
    warm_start_s = time.perf_counter() - start_s
    policy.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    return DemoSetup(
        model_dir=model_dir,
        train_path=train_path,
        test_path=test_path,
        num_parameters=sum(parameter.numel() for parameter in policy.parameters()),
        num_train=num_train,
        num_test=num_test,
        num_warm_start=num_warm_start,
        warm_start_s=warm_start_s,
    )
