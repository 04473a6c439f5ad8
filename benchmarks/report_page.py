"""The report page with many rollouts against one with few: seconds until it is drawn, seconds of a search, megabytes.

    python -m benchmarks.report_page
    python -m benchmarks.report_page --rollouts 500,5000 --repeats 1

The runs are made up, with completions of some 100 tokens each; a page is opened in a headless Chromium, from a file. What is
drawn first are the rollouts, or the curves with Bokeh; a search looks at every completion.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.browser import chromium, open_browser, open_page
from ludic.report.page import write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SENTENCE = (
    "so we have to add the two sums first and then divide what is left by number of boxes which each child gets after "
    "paying for apples pens coins hours miles eggs marbles tickets because every one costs twice as much"
)
WORDS = SENTENCE.split()
GROUP_SIZE, GROUPS = 8, 32
COLUMNS = ("rollouts", "page, MB", "written in, s", "curves, s", "rollouts, s", "search, s", "rollouts, ratio")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}"
SEARCH = """
const done = arguments[arguments.length - 1];
const began = performance.now();
setFilter({ q: "no such words" });
const wait = () => (/^0 of/.test(browser.elements.status.textContent) ? done(performance.now() - began) : setTimeout(wait, 5));
wait();
"""


def rollouts(num_rollouts: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Lines of a rollouts file, 256 an update, in groups of eight."""
    draw = random.Random(seed)
    for number in range(num_rollouts):
        group, member = divmod(number, GROUP_SIZE)
        right = draw.random() < 0.5
        target, step = str(group % 97), 1 + group // GROUPS
        answer = target if right else str(draw.randrange(1000))
        cut = draw.random() < 0.05
        text = " ".join(draw.choices(WORDS, k=draw.randrange(30, 110)))
        yield {
            "step": step,
            "group": group,
            "rollout": member,
            "prompt": f"Problem {group}: how many of the {' '.join(WORDS[group % 30 :][:12])} are left?",
            "completion": text if cut else f"{text}.\n\\boxed{{{answer}}}",
            "completion_token_ids": draw.choices(range(1000), k=100),
            "answer": None if cut else answer,
            "parse_error": "no \\boxed{...} in the text" if cut else None,
            "target": target,
            "reward": float(right and not cut),
            "reward_parts": {"strict": float(right and not cut), "flexible": float(right and not cut)},
            "correct": right and not cut,
            "finish_reason": "length" if cut else "stop",
            "policy_version": step - 1,
            "prompt_tokens": 40,
            "completion_tokens": 100,
        }


def metrics(num_updates: int) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file: an evaluation before and after, the updates, an alarm at the second of them."""
    evaluation = {"eval/num_problems": 200.0, "eval/parse_err_rate": 0.1, "eval/truncation_rate": 0.0}
    evaluation |= {"eval/avg_completion_length": 90.0, "eval/seconds": 3.0}
    for step, rate in ((0, 0.25), (num_updates, 0.5)):
        names = ("accuracy", "strict_accuracy", "qwen_accuracy", "correct_rate")
        yield {"step": step, "time": 1000.0 + 5 * step, **{f"eval/{name}": rate for name in names}, **evaluation}
    for step in range(1, num_updates + 1):
        share = step / num_updates
        yield {
            "step": step,
            "time": 1000.0 + 5 * step,
            "reward_mean": 0.3 + 0.4 * share,
            "avg_completion_length": 100 - 20 * share,
            "truncation_rate": 0.05,
            "parse_err_rate": 0.05,
            "zero_variance_share": 0.2,
            "entropy": 0.5 - 0.2 * share,
            "logprob_gap": 0.004,
            "grad_norm": 0.3,
            "staleness": 0.0,
            "staleness_max": 0.0,
            "tokens_per_s": 9000.0,
            "total_completion_tokens": 25600.0,
            "generation_s": 1.5,
            "grading_s": 0.1,
            "wait_s": 1.2,
            "train_s": 2.0,
            "step_s": 4.0,
            "sync_s": 0.5,
            "sync/send_s": 0.3,
            "policy_version": step,
        }
        if step == 2:
            message = "alarm truncated: 30% of the completions were cut off; raise --max-tokens"
            yield {"step": step, "time": 1000.0 + 5 * step, "event": message}


def make_run(folder: Path, num_rollouts: int, *, seed: int = 0) -> Path:
    """A training's folder with that many rollouts, 256 an update."""
    folder.mkdir(parents=True, exist_ok=True)
    updates = max(2, -(-num_rollouts // (GROUP_SIZE * GROUPS)))
    for name, lines in (("rollouts", rollouts(num_rollouts, seed)), ("metrics", metrics(updates))):
        with (folder / f"sums_train_{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def measure(browser: "Chrome", folder: Path, num_rollouts: int, repeats: int) -> dict[str, float]:
    """The page's size, and medians of the seconds that it took."""
    page = folder / "page.html"
    run = make_run(folder, num_rollouts)
    began = time.perf_counter()
    write_report([run], page, max_rollouts=num_rollouts)
    figures = {"written": time.perf_counter() - began, "megabytes": page.stat().st_size / 1e6}
    for view in ("curves", "rollouts"):
        figures[view] = statistics.median(open_page(browser, page, f"#{view}") for _ in range(repeats))
    figures["search"] = float(browser.execute_async_script(SEARCH)) / 1000
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rollouts", default="500,50000", metavar="N,M", help="of each page (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times that each is opened (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if chromium() is None:
        parser.error("chromium and chromedriver are not on the PATH: apt-get install chromium chromium-driver")
    sys.stdout.write(HEAD + "\n")
    first: float | None = None
    with open_browser() as browser, tempfile.TemporaryDirectory() as folder:
        for number in map(int, arguments.rollouts.split(",")):
            one = measure(browser, Path(folder) / str(number), number, arguments.repeats)
            first = first or one["rollouts"]
            shown = (one["written"], one["curves"], one["rollouts"], one["search"], one["rollouts"] / first)
            cells = [f"{number:,}", f"{one['megabytes']:.2f}", *(f"{figure:.2f}" for figure in shown)]
            sys.stdout.write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
