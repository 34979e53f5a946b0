"""Planning of a run before it starts: every "auto" gets a value, and memory, time and FLOPs are estimated."""
