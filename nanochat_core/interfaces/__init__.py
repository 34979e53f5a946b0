"""The six interfaces that plugins implement, one file per kind, and the loss."""
