"""The studio: pages to try models with a brush, to see, compare and promote versions, and to follow runs.

`app.py` is the application, `security.py` what every request passes, `jobs.py` and `worker.py` the processes that fill
and compare, `cached.py` keeps the registry and the storage; then one module of routes per group of pages.
"""
