"""Evaluator ``bpb``: bits per byte of the training or validation split."""
