"""Fill the hole of one photograph of any size with a trained model; all other pixels stay unchanged."""
