"""From photographs to training batches: storage, sources, shards, edge maps, masks and the stream.

Every module holds plain functions over one slice of the work; `pipelines` decides where they run.
Nothing here knows Ray, MLflow or the models.
"""
