"""Generation: many texts continued at the same time, each as if it were alone."""
