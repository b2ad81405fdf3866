"""`python -m pipelines`, installed as `inpaint`."""

from __future__ import annotations

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
