"""`python -m ludic.doctor`: in under a minute, before money is spent, what would keep a training run from working.

It takes the flags of the training script and says one line a check: ok, warning or failed, with the fix. It starts no
server; with --start-server it looks at what one would need. Left out: whether a run will learn, which `telemetry.alarms`
watches for.
"""
