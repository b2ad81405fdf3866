"""What is run, and the only part that knows Ray and MLflow. `workflow.py` is the chain, `durable/` how it survives; the
links are `data/`, `training/`, `sweeps/`, `evaluation/` and `registry/`; recipes are typed in `recipe.py`.
"""
