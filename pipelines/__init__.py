"""The pipeline on Ray and MLflow. `pipeline.py` defines the steps and `durable/` runs and resumes them; they are
implemented in `data/`, `training/`, `sweeps/`, `evaluation/` and `registry/`. `recipe/` defines the types of recipes.
"""
