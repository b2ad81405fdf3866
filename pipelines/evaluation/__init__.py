"""Trained models and classical baselines on the same photographs and masks: scores, tables, pictures."""
