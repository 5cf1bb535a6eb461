"""Training: optimizer, schedules, the loop, checkpoints and metrics."""
