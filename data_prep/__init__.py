"""From photographs to training batches: storage, sources, shards, edge maps, masks and the batch stream.

Every module holds plain functions for one part of the work; `pipelines` distributes them over Ray. Nothing here imports
Ray, MLflow or the models.
"""
