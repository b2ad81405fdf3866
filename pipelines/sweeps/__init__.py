"""Sweeps: trials of one recipe with other loss weights or another sigma, and the report that compares them."""
