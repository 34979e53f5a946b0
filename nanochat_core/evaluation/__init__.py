"""Evaluating models: what is due, scoring, sampling, results and their statistics."""
