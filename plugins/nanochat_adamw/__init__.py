"""Optimizer plugin ``adamw``: AdamW for every parameter."""
