"""Trials of one recipe with other loss weights or another sigma, and what they show."""
