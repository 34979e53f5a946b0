"""The six interfaces that plugins implement, one module per kind, and the loss."""
