"""Scan of oneDNN's bfloat16 convolutions on this machine's CPU, against float64: `make bfloat16`.

pipelines.training.bfloat16 has the set of convolutions that this scan found right; the others train in float32.
"""
