"""Whether a model fits, and how long an update takes, by arithmetic, for models not run here: `python -m ludic.capacity`.

`shapes` counts parameters exactly, `memory` what a training GPU holds, `pace` the seconds of an update. `plan` puts them
together, `tables` shows them, and `measured` holds them against what was measured. Nothing here imports torch.

More than one training GPU is counted as FSDP2: masters and moments in parts, one layer and the next gathered in bf16, whole
fp32 gradients on each GPU or, with --cpu-offload, none, and a whole bf16 copy of the model on GPU 0. Training without
--cpu-offload has whole weights in place of the copy, and gathers no layers: it needs somewhat less.
Left out: pipeline and context parallelism of the trainer, mixtures of experts, and what training needs more without --compile.

Predictions lie within 20% of what was measured, but for those that docs/capacity.md names as missed: the seconds of a short
update with shared prompts at 0.5B, and of a weight sync while completions are in flight or have just ended.
"""
