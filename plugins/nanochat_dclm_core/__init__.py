"""Evaluator ``core``: DCLM's CORE metric, 22 tasks of in-context learning."""
