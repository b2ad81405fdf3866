"""What is run, and the only part that knows Ray and MLflow: recipes, the workflow and its durable steps,
training, evaluation, the registry and the report. The command line `inpaint` is in `__main__.py`.
"""
