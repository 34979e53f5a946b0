"""Evaluator ``samples``: how the model continues a few prompts."""
