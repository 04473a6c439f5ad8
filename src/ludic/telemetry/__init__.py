"""What a run says about itself: metrics to the terminal, to JSON lines and to W&B, alarms, and the report at its end."""
