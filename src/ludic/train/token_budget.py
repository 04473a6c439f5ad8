"""What a micro-batch's token budget has to hold, and what an update says that did not fit the device it trains on."""

from ludic.config import GRPOConfig


class OutOfMemory(MemoryError):
    """The trainer's device is too small for what was asked; the message names the flag to change."""


def out_of_memory(config: GRPOConfig, *, token_budget: int, pad_to: int) -> OutOfMemory:
    """Of an update with micro-batches of `token_budget` tokens, whose rows are padded to a multiple of `pad_to`."""
    smallest = -(-config.max_seq_len // pad_to) * pad_to
    lower = max(smallest, token_budget // 2)
    flag = f"lower --micro-token-budget {token_budget} (to {lower}, say)"
    if lower >= token_budget:
        flag = "switch --gradient-checkpointing on, or lower --max-seq-len"
    return OutOfMemory(f"the trainer's device ran out of memory in an update: {flag}")


def merging_out_of_memory(config: GRPOConfig) -> OutOfMemory:
    """Of a device that has no room for the second copy of the layers with an adapter."""
    return OutOfMemory(
        "the trainer's device ran out of memory when the adapter was merged into a copy of its layers, for a weight sync or a "
        f"checkpoint: lower --micro-token-budget (it is {config.micro_token_budget or 'auto'}), or name fewer layers with "
        f"--lora-target (it is {config.lora_target})"
    )


def check_row_length(config: GRPOConfig, *, pad_to: int) -> None:
    """Raises ValueError where rows of the token budget, a multiple of `pad_to`, are too short for the longest sequence."""
    budget = config.micro_token_budget
    longest_row = 0 if budget is None else budget - budget % pad_to
    if budget is not None and longest_row < config.max_seq_len:
        raise ValueError(
            f"--micro-token-budget {budget} holds rows of {longest_row} tokens (a multiple of {pad_to}), fewer than "
            f"--max-seq-len {config.max_seq_len}: take {longest_row + pad_to} or more"
        )
