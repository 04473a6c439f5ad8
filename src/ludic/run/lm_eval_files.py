"""Records of an evaluation as lm-evaluation-harness writes its own: `results_*.json`, and `samples_*.jsonl` a line for each
problem and rule, for the viewers that read those (W&B's tables, Zeno, `datasets`).

A rule of the environment is what the harness calls a filter, its verdict is `exact_match`. With several completions a problem
`exact_match` is their mean, where the harness would take the first.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ludic.rollout.problems import ProblemRecord, answering_text, recorded_rules, verdicts
from ludic.storage.inert import inert

INVALID = "[invalid]"
"""What the harness writes where a filter found nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessView:
    """What the harness would say of a task beyond our records."""

    task: str
    """Its name there, e.g. `gsm8k`."""
    num_few_shot: int = 0
    version: float | str = "ludic"
    until: Sequence[str] = ()
    """Texts that end a completion."""
    docs: Sequence[Mapping[str, Any]] = ()
    """[n]: the rows of the data set, by `index`; by default a question and a target from the record."""
    targets: Sequence[str] = ()
    """[n]: the references as the harness has them; by default the record's."""
    completion: Callable[[str], str] = field(default=lambda text: text)
    """A text as the harness keeps it."""
    answer: Callable[[str, str], str] | None = None
    """What (rule, text) finds; by default the recorded answer."""


def write_lm_eval_files(
    records: Sequence[ProblemRecord], settings: Mapping[str, Any], folder: Path, view: HarnessView
) -> tuple[Path, Path]:
    """Write both files into a folder of the model's in `folder`; returns the results and the samples.

    Raises:
        ValueError: there are no records.
        OSError: a file cannot be written.
    """
    if not records:
        raise ValueError("there are no records to write: the evaluation has not finished a problem")
    ordered = sorted(records, key=lambda record: record["index"])
    rules = recorded_rules(ordered[0])
    samples = [sample for rule in rules for sample in _samples(ordered, rule, settings, view)]
    model = re.sub(r"[\"<>:/|\\?*\[\]]+", "__", str(settings["model"]))  # as the harness names folders
    here, now = folder / model, datetime.now().isoformat().replace(":", "-")
    here.mkdir(parents=True, exist_ok=True)
    results_path, samples_path = here / f"results_{now}.json", here / f"samples_{view.task}_{now}.jsonl"
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    samples_path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")
    results = _results(ordered, rules, samples, settings, view) | {"model_name_sanitized": model}
    text = json.dumps(results, indent=2, ensure_ascii=False)
    results_path.write_text(text, encoding="utf-8", errors="replace")
    return results_path, samples_path


def _samples(
    records: Sequence[ProblemRecord], rule: str, settings: Mapping[str, Any], view: HarnessView
) -> Iterator[dict[str, Any]]:
    for record in records:
        index, messages = record["index"], record["prompt"]
        question = str(messages[-1]["content"])
        doc = dict(view.docs[index]) if view.docs else {"question": question, "target": record["target"]}
        target = view.targets[index] if view.targets else record["target"]
        plain = settings.get("prompt_format") == "lm-eval"
        prompt = question if plain else json.dumps(messages, ensure_ascii=False)
        texts = [view.completion(one["text"]) for one in record["completions"]]
        answers = [one["answer"] or INVALID for one in record["completions"]]
        if view.answer is not None:
            answers = [view.answer(rule, answering_text(one)) for one in record["completions"]]
        yield {
            "doc_id": index,
            "doc": doc,
            "target": target,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _generation(settings, view)}},
            "resps": [texts],
            "filtered_resps": answers,
            "filter": rule,
            "metrics": ["exact_match"],
            "doc_hash": _digest(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": _digest(prompt),
            "target_hash": _digest(target),
            "exact_match": fmean(verdicts(record, rule)),
        }


def _generation(settings: Mapping[str, Any], view: HarnessView) -> dict[str, Any]:
    temperature = float(settings["temperature"])
    return {"until": list(view.until), "do_sample": temperature > 0, "temperature": temperature}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()


def _results(
    records: Sequence[ProblemRecord],
    rules: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    view: HarnessView,
) -> dict[str, Any]:
    task, count = view.task, len(records)
    figures: dict[str, Any] = {"name": task, "alias": task, "sample_len": count}
    for rule in rules:
        scores = [sample["exact_match"] for sample in samples if sample["filter"] == rule]
        figures[f"exact_match,{rule}"] = fmean(scores)
        figures[f"exact_match_stderr,{rule}"] = stdev(scores) / math.sqrt(count) if count > 1 else "N/A"
    config = {
        "task": task,
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": rule} for rule in rules],
        "generation_kwargs": _generation(settings, view),
        "num_fewshot": view.num_few_shot,
        "repeats": settings["samples"],
    }
    return {
        "results": {task: figures},
        "group_subtasks": {},
        "configs": {task: config},
        "versions": {task: view.version},
        "n-shot": {task: view.num_few_shot},
        "higher_is_better": {task: {"exact_match": True}},
        "n-samples": {task: {"original": count, "effective": count}},
        "config": {"model": f"ludic {version('ludic')}", "model_args": dict(settings), "limit": None},
        "date": time.time(),
        "task_hashes": {task: _digest("".join(_hashes(sample) for sample in samples))},
        "model_source": "ludic",
        "model_name": inert(str(settings["model"])),
    }


def _hashes(sample: Mapping[str, Any]) -> str:
    return "".join(str(sample[name]) for name in ("doc_hash", "prompt_hash", "target_hash"))
