"""What tells weights from others and is the same on every machine: exact sums of bits, in which no rounding has a part."""

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


def bit_sums(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Of each parameter by name, sorted, the sum of its bits read as integers, modulo 2^64; in `dtype`, or else in its own.

    The same on every device, for any number of threads and any kind of CPU, which a sum of floats is not.
    """
    sums = {}
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach() if dtype is None else parameter.detach().to(dtype)
        sums[name] = tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
    if not sums:
        return {}
    return dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True))
