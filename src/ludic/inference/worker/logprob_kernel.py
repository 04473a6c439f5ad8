"""Log-probs of one token per row in one pass over the logits, for the GPU. `vllm_logprobs.scored` is the way in.

A row of logits is cut into blocks that are reduced side by side, since a decoding step has few rows and a large vocabulary:
one program a row would leave most of the GPU idle, and `log_softmax` writes B x V numbers of which B are wanted.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_blocks(logits, stride, vocab_size, maxima, sums, num_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """maxima[row, block] = max of the block's logits; sums[row, block] = sum of exp(logit - max)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)  # nothing of the block is left after top-k or top-p
    tl.store(maxima + row * num_blocks + block, top)
    tl.store(sums + row * num_blocks + block, tl.sum(tl.exp(x - shift), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _score(  # type: ignore[no-untyped-def]
    logits, stride, token_ids, maxima, sums, num_blocks, out_ids, out_logprobs, BLOCKS: tl.constexpr
):
    """out_ids[row] = the token; out_logprobs[row] = its logit - the logarithm of the sum of exp over the row."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    is_block = blocks < num_blocks
    top = tl.load(maxima + row * num_blocks + blocks, mask=is_block, other=float("-inf"))
    part = tl.load(sums + row * num_blocks + blocks, mask=is_block, other=0.0)
    highest = tl.max(top, axis=0)
    total = tl.sum(part * tl.exp(top - highest), axis=0)
    token_id = tl.load(token_ids + row).to(tl.int64)
    x = tl.load(logits + row * stride + token_id).to(tl.float32)
    tl.store(out_ids + row, token_id.to(tl.int32))
    tl.store(out_logprobs + row, x - highest - tl.log(total))


def scored_by_triton(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[2, at least B] int32: `token_ids` [B], and the bits of their log-probs under `logits` [B, V], in float32."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    token_ids = token_ids.contiguous()
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    # All begin at a multiple of 16 bytes, whatever the batch: Triton compiles anew for another alignment of a pointer.
    maxima = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(maxima)
    packed = torch.empty((2, triton.cdiv(num_rows, 32) * 32), dtype=torch.int32, device=logits.device)
    _reduce_blocks[(num_rows, num_blocks)](
        logits, logits.stride(0), vocab_size, maxima, sums, num_blocks, BLOCK=_BLOCK, num_warps=8
    )
    _score[(num_rows,)](
        logits, logits.stride(0), token_ids, maxima, sums, num_blocks, packed[0], packed[1].view(torch.float32),
        BLOCKS=triton.next_power_of_2(num_blocks), num_warps=1,
    )  # fmt: skip
    return packed
