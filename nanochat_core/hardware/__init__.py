"""Devices and machines: their specifications, memory, peak speed and number formats."""
