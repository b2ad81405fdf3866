"""Photographs -> tars -> edge tars, one Ray task per partition or tar; also inspection and repair."""
