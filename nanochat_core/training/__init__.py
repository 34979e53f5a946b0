"""Training: preparing or resuming a run, the optimizer step, the loop."""
