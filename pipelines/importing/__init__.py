"""Imports checkpoints of public implementations and registers them as versions of our models."""
