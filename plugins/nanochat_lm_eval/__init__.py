"""Evaluator ``lm_eval``: any task of EleutherAI's lm-evaluation-harness."""
