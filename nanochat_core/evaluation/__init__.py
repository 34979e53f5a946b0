"""Evaluation of models: when evaluators run, scoring, sampling, results and their statistics."""
