"""Bytes that training keeps of a parameter, also for arithmetic without a GPU. Imports nothing: --help has to be quick."""

MASTER_BYTES = 4
"""The fp32 master."""
MOMENTS_BYTES = 8
"""AdamW's two fp32 moments."""
GRADIENT_BYTES = 4
"""The fp32 gradient, from an update's first micro-batch to its step."""
COMPUTE_BYTES = 2
"""The bf16 copy that the model computes with and that the server is sent."""
CHECKPOINT_BYTES = MASTER_BYTES + MOMENTS_BYTES
USABLE_SHARE = 0.95
"""Of a GPU's memory: what training may need by count. Fragmentation and the longest prompts come on top."""
