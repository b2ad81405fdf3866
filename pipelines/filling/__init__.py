"""One photograph's hole filled by a trained model, at any size, with every other pixel as it was."""
