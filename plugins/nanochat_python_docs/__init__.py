"""Data source ``python_docs``: the documentation inside Python, without a download."""
