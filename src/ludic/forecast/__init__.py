"""What a run will be like, from 64 probe rollouts: `train_gsm8k.py --forecast`, before money is spent.

`probe` measures with the parts of a real run, `figures` computes the forecast from that, `outcome` reads what came true from
the files of a run, and `table` shows both. Left out: how solve rates and lengths change while the policy learns.
"""
