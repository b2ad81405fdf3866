"""What several test files share. pytest's `pythonpath` holds tests/, so it is imported as `support`."""
