"""fp32 masters behind a model that computes in bf16.

bf16 keeps 8 bits of a number, so an AdamW step of 1e-6 on a weight of 0.1 would round to nothing, and so would the
sum of many small gradients. Master weights, their gradients and the optimizer's state are therefore fp32; the model's own
parameters are rounded copies of the masters, made once an update. Compared with autocast, which rounds every weight anew
in each forward pass and keeps the residual stream in fp32, this moves fewer bytes, and the trainer computes with the very
tensors that the inference server is sent.

Each gradient of a micro-batch is added to its master's in fp32 as soon as it is there, and freed.

Rounding is also where it shows whether a step did anything: the share of the rounded weights that it changed is what the
inference server can notice of it. It is counted on the device as the weights are rounded.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Published(NamedTuple):
    """What a step did to the weights as the server is sent them: scalars on the device."""

    changed: torch.Tensor
    """float64: how many of the rounded weights are others than before, to one in 10 million of a tensor"""
    finite: torch.Tensor
    """bool: whether all of them are finite"""


class MasterWeights:
    """Makes `model` compute in `compute_dtype`, in place, and keeps what it was made from.

    With `compute_dtype` float32 the model's parameters are their own masters and nothing is copied.

    Args:
        model: float32 parameters; they become the masters, and the model gets new ones in `compute_dtype`.
        compute_dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: a parameter is not float32.
    """

    def __init__(self, model: torch.nn.Module, *, compute_dtype: torch.dtype) -> None:
        wrong = next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is not float32: load the policy with dtype=torch.float32, its masters must be")
        self.names = [name for name, _ in model.named_parameters()]
        """Of the parameters; a tied one has one name."""
        self._computing = [parameter for _, parameter in model.named_parameters()]
        self.parameters = self._computing
        """The masters, in the order of the model's parameters: what the optimizer steps, with fp32 gradients."""
        self._separate = compute_dtype != torch.float32
        if self._separate:
            self.parameters = [
                torch.nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
                for parameter in self._computing
            ]
            for parameter, master in zip(self._computing, self.parameters, strict=True):
                parameter.data = master.data.to(compute_dtype)
                if parameter.requires_grad:  # a frozen one has no gradient to collect
                    parameter.register_post_accumulate_grad_hook(_Collect(master))
        # Trained ones only, with what the server has of them: the model's own, or bf16 copies kept to compare with.
        self._buckets = _bucketed(
            [
                (computing if self._separate else master.data.to(torch.bfloat16), master)
                for computing, master in zip(self._computing, self.parameters, strict=True)
                if computing.requires_grad and computing.numel()
            ]
        )
        self.num_trained = sum(master.numel() for bucket in self._buckets for _, master in bucket)
        """How many weights are trained."""

    @torch.no_grad()
    def publish(self) -> "Published":
        """Round the masters into the model's parameters: after every optimizer step. Does not wait for the device.

        Some 20 bytes a weight are moved to compare, beside the 28 of the step itself, in a few launches a bucket.
        """
        device = self.parameters[0].device
        changed = torch.zeros((), dtype=torch.float64, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        for bucket in self._buckets:
            rounded, masters = [rounded.data for rounded, _ in bucket], [master.data for _, master in bucket]
            step = [torch.empty_like(tensor) for tensor in rounded]
            torch._foreach_copy_(step, masters)
            torch._foreach_sub_(step, rounded)
            finite &= torch.stack(torch._foreach_norm(step, math.inf)).isfinite().all()
            torch._foreach_sign_(step)
            changed += torch.stack(torch._foreach_norm(step, 1, dtype=torch.float32)).double().sum()
            torch._foreach_copy_(rounded, masters)
        return Published(changed=changed, finite=finite)

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


_BUCKET = 2**26
"""Weights that are compared at a time: what they need beside themselves is 2 bytes each, or one copy of a larger tensor."""


def _bucketed(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
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
