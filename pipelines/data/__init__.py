"""Photographs -> tars -> edge tars, a slice of the work a Ray task; looking at them, and repairs."""
