"""fp32 masters behind a model that computes in bf16.

bf16 keeps 8 bits of a number, so an AdamW step of 1e-6 on a weight of 0.1 would round to nothing, and so would the
sum of many small gradients. Master weights, their gradients and the optimizer's state are therefore fp32; the model's own
parameters are rounded copies of the masters, made once an update: the very tensors that the inference server is sent. The
share of them that a step changed, which is what the server can notice of it, is counted as they are rounded. What is frozen and
rounded already, as the base below an adapter (`lora`), is its own master.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle


class Published(NamedTuple):
    """What a step did to the weights as the server is sent them: scalars on the device."""

    changed: torch.Tensor
    """float64: how many of the rounded weights are others than before, to one in 10 million of a tensor"""
    finite: torch.Tensor
    """bool: whether all of them are finite"""


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay is for this whole parameter: a matrix or an embedding."""
    return parameter.dim() > 1 and not name.endswith("bias")


class MasterWeights:
    """Makes `model` compute in `compute_dtype`, in place, and keeps what it was made from.

    With `compute_dtype` float32 the model's parameters are their own masters and nothing is copied.

    Args:
        model: float32 parameters; they become the masters, and the model gets new ones in `compute_dtype`. Frozen ones may
            be in `compute_dtype` already.
        compute_dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: a parameter is not float32.
    """

    holds_gradients: bool = False
    """Whether memory for all gradients is allocated from the start."""

    def __init__(self, model: torch.nn.Module, *, compute_dtype: torch.dtype) -> None:
        check_float32(model, unless_frozen=compute_dtype)
        self.names = [name for name, _ in model.named_parameters()]
        """Of the parameters; a tied one has one name."""
        self._computing = [parameter for _, parameter in model.named_parameters()]
        self.parameters = self._computing
        """The masters, in the order of the model's parameters: what the optimizer steps, with fp32 gradients."""
        self._separate = compute_dtype != torch.float32
        self._hooks: list[RemovableHandle] = []
        if self._separate:
            self.parameters = [
                torch.nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
                for parameter in self._computing
            ]
            for parameter, master in zip(self._computing, self.parameters, strict=True):
                parameter.data = master.data.to(compute_dtype)  # the master's own where it is rounded already
                if parameter.requires_grad:  # a frozen one has no gradient to collect
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(_Collect(master)))
        self._buckets = bucketed(
            [
                (computing, master)
                for computing, master in zip(self._computing, self.parameters, strict=True)
                if computing.requires_grad and computing.numel()
            ]
        )
        """Of the trained ones, the model's parameters and their masters."""
        self.num_trained = sum(master.numel() for bucket in self._buckets for _, master in bucket)
        """How many weights are trained."""
        # What the server has of each bucket, where that is not what the model computes with: kept to compare with.
        self._sent = [] if self._separate else [_rounded(bucket) for bucket in self._buckets]

    @torch.no_grad()
    def publish(self) -> "Published":
        """Round the masters into the model's parameters: after every optimizer step. Does not wait for the device.

        Some 20 bytes a weight are moved to compare, beside the 28 of the step itself, in a few launches a bucket.
        """
        device = self.parameters[0].device
        if self._separate:
            return round_masters(self._buckets, device)
        changed = torch.zeros((), dtype=torch.float64, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        for place, sent in enumerate(self._sent):
            self._sent[place] = flat = _rounded(self._buckets[place])
            changed += (flat != sent).sum()
            finite &= flat.abs().amax().isfinite()  # the largest is NaN where any is; one by one it is slow on a CPU
        return Published(changed=changed, finite=finite)

    @torch.no_grad()
    def decay(self, amount: float) -> None:
        """AdamW's decoupled weight decay (arXiv 1711.05101) of matrices and embeddings, as is usual: norms set a scale and
        biases a place, and neither is better for being near 0. `amount` is the learning rate times the decay.

        By hand and not by a second group of the optimizer, whose one group keeps the parameters in the model's order, as
        checkpoints do.
        """
        if amount:
            decayed: list[torch.Tensor] = [
                master
                for name, master in zip(self.names, self.parameters, strict=True)
                if master.grad is not None and decays(name, master)
            ]
            torch._foreach_mul_(decayed, 1 - amount)

    def release(self) -> None:
        """Give the model its float32 weights back, at the end of a training that is not the last one."""
        for hook in self._hooks:
            hook.remove()
        for parameter, master in zip(self._computing, self.parameters, strict=True):
            parameter.data = master.data

    def state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with the masters in the place of the rounded parameters."""
        state: dict[str, torch.Tensor] = model.state_dict()
        if self._separate:
            masters = {
                parameter.data_ptr(): master.data
                for parameter, master in zip(self._computing, self.parameters, strict=True)
            }
            state = {name: masters.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}
        return state


def check_float32(model: torch.nn.Module, *, unless_frozen: torch.dtype = torch.float32) -> None:
    """Refuse a policy whose parameters cannot be masters; the ValueError names the first. Frozen ones may be in
    `unless_frozen`."""
    fitting = ((torch.float32, True), (torch.float32, False), (unless_frozen, False))
    wrong = next((name for name, p in model.named_parameters() if (p.dtype, p.requires_grad) not in fitting), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is not float32: load the policy with dtype=torch.float32, its masters must be")


def _rounded(bucket: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The masters of a bucket end to end, as the server is sent them. On a CPU a call a parameter would cost as much as the
    optimizer's step."""
    masters = [master.data.flatten() for _, master in bucket]
    sizes = [master.numel() for master in masters]
    flat = torch.empty(sum(sizes), dtype=torch.bfloat16, device=masters[0].device)
    torch._foreach_copy_(flat.split(sizes), masters)
    return flat


_BUCKET = 2**26
"""Weights that are compared at a time: what they need beside themselves is 2 bytes each, or one copy of a larger tensor."""


@torch.no_grad()
def round_masters(buckets: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], device: torch.device) -> Published:
    """Round each master into its copy, the first of a pair, and count what that changes. Does not wait for the device."""
    changed = torch.zeros((), dtype=torch.float64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for bucket in buckets:
        rounded, masters = [rounded.data for rounded, _ in bucket], [master.data for _, master in bucket]
        step = [torch.empty_like(tensor) for tensor in rounded]
        torch._foreach_copy_(step, masters)
        torch._foreach_sub_(step, rounded)
        finite &= torch.stack(torch._foreach_norm(step, math.inf)).isfinite().all()
        torch._foreach_sign_(step)
        changed += torch.stack(torch._foreach_norm(step, 1, dtype=torch.float32)).double().sum()
        torch._foreach_copy_(rounded, masters)
    return Published(changed=changed, finite=finite)


def bucketed(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The pairs of copy and master in lists of so many weights as are compared at a time."""
    buckets: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    room = 0
    for pair in pairs:
        room -= pair[1].numel()
        if room < 0:
            buckets.append([])
            room = _BUCKET - pair[1].numel()
        buckets[-1].append(pair)
    return buckets


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round `model`'s parameters, in place. Unlike `Module.to` it leaves buffers alone: rotary frequencies in bf16 would turn
    positions beyond a few hundred into others."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class _Collect:
    """Adds a parameter's gradient to its master's, and frees it."""

    def __init__(self, master: torch.nn.Parameter) -> None:
        self._master = master

    def __call__(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if self._master.grad is None:
            self._master.grad = parameter.grad.float()
        else:
            self._master.grad.add_(parameter.grad)
        parameter.grad = None
