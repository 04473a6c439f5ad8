"""Every metric that a run logs: its name, unit, meaning and healthy range, in one table.

The tables of docs/metrics.md are made from it, and so is a text at TensorBoard. A healthy range is what an alarm watches, or
what follows from the definition (a share, a count of failures). Where a figure depends on the model, the task or the machine,
the table says that there is no fixed range.
"""

from typing import NamedTuple

from ludic.telemetry import alarms


class Metric(NamedTuple):
    """One metric. `sync/PHASE_s` stands for every part of a weight sync."""

    name: str
    unit: str
    """`fraction` is of 1; log-probabilities and divergences are in nats; `s` is seconds."""
    meaning: str
    """`only with ...` where a run may lack it."""
    healthy: str


ANY = "no fixed range"

# fmt: off
METRICS: dict[str, tuple[Metric, ...]] = {
    "Rewards and completions": (
        Metric("reward_mean", "reward", "mean of the reward over all completions of the update",
               f"rises over {alarms.FLAT_UPDATES} updates, unless `correct_rate` is above {alarms.SOLVED_RATE:g} "
               "(alarm `reward_flat`)"),
        Metric("reward_std", "reward", "standard deviation of the reward over all completions of the update",
               "above 0: without differences nothing is learned"),
        Metric("overlong_reward", "reward",
               "mean of the part of the reward that punishes long completions; only with `--overlong-buffer`",
               "-1 to 0, and rises"),
        Metric("correct_rate", "fraction", "share of completions whose answer is right",
               "rises with `reward_mean`"),
        Metric("parse_err_rate", "fraction", "share of completions in which the parser finds no answer",
               f"less than {alarms.PARSE_RATE_FALL:g} above its best (alarm `parse_rate`)"),
        Metric("truncation_rate", "fraction", "share of completions that were cut off",
               f"at most {alarms.TRUNCATED_SHARE:g} (alarm `truncated`)"),
        Metric("grader_failures", "completions",
               "completions that the grader gave up on; their reward is 0",
               f"0; at most {alarms.GRADER_FAILURE_SHARE:.0%} of the completions (alarm `grader`)"),
        Metric("grader_timeouts", "completions", "of these, how many timed out in math-verify", "0"),
        Metric("avg_completion_length", "tokens", "mean length of a completion", f"{ANY}; at most `--max-tokens`"),
        Metric("total_completion_tokens", "tokens", "tokens of all completions of the update", ANY),
        Metric("prompt_tokens", "tokens",
               "tokens of the update's prompts; a prompt counts once for each of its completions", ANY),
    ),
    "What is trained on": (
        Metric("zero_variance_groups", "groups",
               "groups whose completions all got the same reward: none is better or worse, so their advantages are 0; "
               "without `--kl-coef` they are not forwarded. `--dynamic-sampling` replaces them, and also those that only the "
               "punishment of `--overlong-buffer` tells apart, which then count here",
               f"{ANY}; see `zero_variance_share`"),
        Metric("zero_variance_share", "fraction", "the share of such groups among those that were generated",
               f"at most {alarms.ZERO_VARIANCE_SHARE:g} (alarm `zero_variance`)"),
        Metric("generated_groups", "groups",
               "groups that were generated for the update; only with `--dynamic-sampling`",
               f"{ANY}; at most `--max-sampling-factor` times the update's groups"),
        Metric("replaced_groups", "groups",
               "how many of them had no variance and were replaced; only with `--dynamic-sampling`", ANY),
        Metric("sampling_bound_reached", "0 or 1",
               "1 if `--max-sampling-factor` left groups without variance in the update; only with `--dynamic-sampling`", "0"),
        Metric("skipped_prompts", "prompts",
               "prompts that were passed over for the update; only with `--drop-solved` or `--curriculum`", ANY),
        Metric("solved_prompts", "prompts",
               "prompts that count as solved after the update; only with `--drop-solved`", ANY),
        Metric("truncated_masked", "completions", "completions left out of the loss by `--mask-truncated`",
               f"{ANY}; see `truncation_rate`"),
        Metric("dropped_groups", "groups",
               "groups that were older than `--max-staleness` when their update came: not trained on", "0"),
        Metric("dropped_without_logprobs", "sequences",
               "sequences without the sampler's log-probabilities, which therefore could not be corrected: not trained on",
               "0"),
        Metric("nonfinite_logprobs", "completions",
               "completions whose log-probabilities from the sampler were not finite: trained on as if they had none", "0"),
        Metric("trained_sequences", "sequences", "sequences in the loss", f"{ANY}; at most `--rollouts-per-update`"),
        Metric("trained_tokens", "tokens", "tokens of these sequences with their prompts", ANY),
        Metric("forwarded_tokens", "tokens",
               "tokens that the model was run over: a shared prompt counts once in a micro-batch. With `--mini-batches` the "
               "pass before the first step counts too; epochs after the first do not",
               f"{ANY}; at most `trained_tokens`, or twice that with `--mini-batches`"),
        Metric("micro_batches", "rows", "rows that the update was packed into", ANY),
        Metric("num_loss_tokens", "tokens", "tokens that the loss is computed on", ANY),
        Metric("num_positive_tokens", "tokens", "of these, those with a positive advantage", ANY),
        Metric("num_negative_tokens", "tokens", "of these, those with a negative advantage", ANY),
    ),
    "Loss, gradient and optimizer": (
        Metric("loss", "none", "the policy loss of the whole update, KL term included", ANY),
        Metric("grad_norm", "none", "the gradient's norm before clipping",
               f"{ANY}; not above `--max-grad-norm` all the time (alarm `clipping`)"),
        Metric("grad_clipped", "0 or 1", "1 if the norm was above `--max-grad-norm`",
               f"0 at least once in {alarms.CLIPPED_UPDATES} updates (alarm `clipping`)"),
        Metric("changed_weights_share", "fraction",
               "share of the weights that one optimizer step changed, after rounding to what the server gets (bf16 on a GPU)",
               f"at least {alarms.CHANGED_WEIGHTS_SHARE:.4f} (alarm `changed_weights`)"),
        Metric("skipped_update", "0 or 1",
               "1 if the update was skipped because a loss, a log-prob or the gradient was not finite, else 0", "0"),
        Metric("optimizer_steps", "steps",
               "optimizer steps of the update; only with `--epochs-per-update` or `--mini-batches` above 1",
               "the product of the two; less where fewer groups than mini-batches have variance"),
        Metric("skipped_steps", "steps",
               "optimizer steps of the update that were skipped for that reason; only with `--epochs-per-update` or "
               "`--mini-batches` above 1", "0"),
        Metric("nonfinite_losses", "micro-batches",
               "micro-batches whose loss was not finite; only with a step that was skipped", "0"),
        Metric("nonfinite_policy_logprobs", "tokens",
               "tokens whose log-probability was not finite; only with a step that was skipped", "0"),
        Metric("nonfinite_gradients", "parameters",
               "parameters whose gradient was not finite; only with a step that was skipped", "0"),
        Metric("nonfinite_metrics", "metrics",
               "figures that were left out of the log because they were not finite; only with at least one", "0"),
        Metric("learning_rate", "none", "learning rate of this update", "what `--lr` and its schedule say"),
        Metric("entropy", "nats", "entropy of the policy at the trained tokens",
               f"{ANY}; at least {alarms.ENTROPY_SHARE:g} of that of the first {alarms.WINDOW} updates (alarm `entropy`)"),
        Metric("clip_fraction", "fraction",
               "share of tokens whose gradient the clipping cut off; 0 with one optimizer step an update and the ratio to its "
               "start", ANY),
        Metric("clip_fraction_positive", "fraction",
               "the same of the tokens with a positive advantage, where the upper clip acts; only with such tokens", ANY),
        Metric("clip_fraction_negative", "fraction",
               "the same of the tokens with a negative advantage, where the lower and the dual clip act; only with such tokens",
               ANY),
        Metric("ratio_mean", "ratio",
               "mean ratio of the policy to the one that `--ratio-to` names; 1 with one optimizer step and the update's start",
               "near 1"),
        Metric("kl_old", "nats",
               "divergence of the policy from the one that `--ratio-to` names; 0 with one optimizer step and the update's start",
               f"{ANY}; at least 0"),
        Metric("kl_old_positive", "nats", "the same over the tokens with a positive advantage; only with such tokens",
               f"{ANY}; at least 0"),
        Metric("kl_old_negative", "nats", "the same over the tokens with a negative advantage; only with such tokens",
               f"{ANY}; at least 0"),
        Metric("kl_ref", "nats", "divergence from the initial policy; only with `--kl-coef`", f"{ANY}; at least 0"),
    ),
    "Trainer against sampler": (
        Metric("kl_rollout", "nats",
               "divergence of the trainer's policy from the sampler's, over the tokens whose log-probabilities the sampler "
               "gave; only with `num_gap_tokens`", f"{ANY}; at least 0"),
        Metric("num_gap_tokens", "tokens",
               "number of these tokens (`--logprob-share` of the groups, all where they correct); only with at least one",
               ANY),
        Metric("kl", "nats", "`kl_ref` if there is a reference policy, else `kl_rollout`; only with one of them",
               f"{ANY}; at least 0"),
        Metric("logprob_gap", "nats",
               "mean difference between the sampler's and the trainer's log-probabilities of a token; only with "
               "`num_gap_tokens`",
               f"at most {alarms.LOGPROB_GAP_LARGE:g} (alarm `logprob_gap_large`), and no rise to {alarms.LOGPROB_GAP_RISE:g} "
               "times that of the first updates (alarm `logprob_gap`); bf16 alone makes 0.005 to "
               f"{alarms.LOGPROB_GAP_NATS:g}"),
        Metric("logprob_gap_max", "nats", "the largest such difference; only with `num_gap_tokens`", ANY),
        Metric("tis_weight_mean", "ratio",
               "mean importance weight between trainer and sampler, 0 for masked tokens; only with a `--tis-cap`, an "
               "`--importance-mask` or `--max-staleness`", "near 1"),
        Metric("importance_masked_fraction", "fraction",
               "share of tokens that `--importance-mask` masked; only with one", f"{ANY}; small"),
        Metric("tis_capped_fraction", "fraction",
               "share of these weights that reached the cap; only with a `--tis-cap` or `--max-staleness`", ANY),
        Metric("policy_version", "none", "version of the weights that the engine holds after this update",
               "1 more each update"),
        Metric("staleness", "updates",
               "mean number of updates between the weights that sampled a completion (the first ones, if they changed on the "
               "way) and the weights that it trains", "0 to `--max-staleness`"),
        Metric("staleness_max", "updates", "the largest such number", "0 to `--max-staleness`"),
    ),
    "Seconds and speed": (
        Metric("generation_s", "s", "from the update's first request to its last completion",
               f"{ANY}; less than {alarms.GENERATION_SLOWDOWN:g} times its lowest for as much work (alarm `queue`)"),
        Metric("grading_s", "s", "how much longer grading took", ANY),
        Metric("wait_s", "s", "how long the trainer waited for rollouts with nothing else to do", ANY),
        Metric("train_s", "s", "time the training loop spent on training; on a GPU, work may continue after it", ANY),
        Metric("sync_s", "s", "how long the weight sync with its proof took", ANY),
        Metric("step_s", "s", "how long the whole update took", ANY),
        Metric("tokens_per_s", "tokens/s", "completion tokens over the seconds of the whole update", ANY),
    ),
    "Server and weight syncs": (
        Metric("server_recoveries", "times",
               "how often this process lost its server and set out to recover it; only with a server", "0"),
        Metric("discarded_completions", "completions",
               "completions that were requested again because of that; only with a server", "0"),
        Metric("request_retries", "requests", "requests of this process that were repeated; only with a server", "0"),
        Metric("bad_replies", "requests",
               "how many of them because the reply was damaged or answered another request; only with a server", "0"),
        Metric("sync/PHASE_s", "s", "seconds of each part of the sync, e.g. `sync/send_s`", ANY),
        Metric("sync/logprob_gap", "nats",
               "mean difference of log-probabilities on the probe prompt; only with a server, at its first two syncs, every "
               "tenth, and whenever digests could not compare all tensors", "at most 0.15: above it the sync is an error"),
    ),
    "Evaluation": (
        Metric("eval/accuracy", "fraction",
               "by the environment's headline rule, as in the [summary of an "
               "evaluation](files.md#fields-of-gsm8k_evaljsonlsummaryjson)", "rises with `reward_mean`"),
        Metric("eval/strict_accuracy", "fraction",
               "by GSM8K's second rule; only with an environment that [names such a rule](api.md#scores-and-grading)", ANY),
        Metric("eval/qwen_accuracy", "fraction",
               "by GSM8K's third rule; only with an environment that [names such a rule](api.md#scores-and-grading)", ANY),
        Metric("eval/correct_rate", "fraction", "as in the summary", "rises with `correct_rate`"),
        Metric("eval/parse_err_rate", "fraction", "as in the summary", f"{ANY}; see `parse_err_rate`"),
        Metric("eval/truncation_rate", "fraction", "as in the summary", f"{ANY}; see `truncation_rate`"),
        Metric("eval/avg_completion_length", "tokens", "as in the summary", ANY),
        Metric("eval/num_problems", "problems", "as in the summary", ANY),
        Metric("eval/seconds", "s", "as in the summary", ANY),
    ),
}
"""By the heading that they stand under."""
# fmt: on


def metric_tables(level: int = 3) -> str:
    """The table in Markdown, one for each heading of `level` number signs."""
    lines = []
    for heading, metrics in METRICS.items():
        lines += [f"{'#' * level} {heading}", "", "| metric | unit | meaning | healthy range |", "|---|---|---|---|"]
        lines += [f"| `{one.name}` | {one.unit} | {one.meaning} | {one.healthy} |" for one in metrics]
        lines.append("")
    return "\n".join(lines).rstrip()
