"""The run's log, and external loggers, each in a process of its own."""
