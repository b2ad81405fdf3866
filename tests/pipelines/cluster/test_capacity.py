"""Workers that fit on no node are reported; Ray would wait for them forever."""

from __future__ import annotations

import re

import pytest

from pipelines.cluster.capacity import infeasible_reason
from pipelines.recipe.load import load_recipe

LAPTOP = [{"CPU": 2.0, "memory": 1e9}]
CLUSTER = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}, {}]


@pytest.mark.parametrize(
    ("nodes", "scaling", "words"),
    [
        (LAPTOP, ["gpus_per_worker=1"], "1 GPU"),
        (LAPTOP, ["cpus_per_worker=3"], "3 CPU"),
        (LAPTOP, ["workers=3"], "scaling.workers = 3"),
        (LAPTOP, ["workers=[3,4]"], "scaling.workers = 3"),
        (CLUSTER, ["gpus_per_worker=4"], "4 GPU"),
        (CLUSTER, ["workers=3", "gpus_per_worker=1"], "scaling.workers = 3"),
        (CLUSTER, ["cpus_per_worker=6", "workers=2"], "scaling.workers = 2"),
    ],
)
def test_workers_that_do_not_fit_are_reported_and_the_remedy_fits(
    nodes: list, scaling: list[str], words: str
) -> None:
    base = [f"scaling.{text}" for text in scaling]
    reason = infeasible_reason(load_recipe("demo", base).scaling, nodes)
    assert words in reason
    remedies = re.findall(r"--set (\S+=[\d.]+)", reason)
    assert remedies
    assert infeasible_reason(load_recipe("demo", [*base, *remedies]).scaling, nodes) == ""


def test_nothing_is_reported_if_the_workers_fit() -> None:
    for nodes, scaling in (
        (LAPTOP, ["workers=2"]),
        (LAPTOP, ["workers=4", "cpus_per_worker=0.5"]),
        (LAPTOP, ["workers=[1,9]"]),
        (
            LAPTOP,
            [
                "workers=20",
                "cpus_per_worker=0.1",
            ],
        ),
        (CLUSTER, ["workers=4", "gpus_per_worker=0.5"]),
    ):
        overrides = [f"scaling.{text}" for text in scaling] + ["models.edge_connect.train.batch=20"]
        overrides += ["models.context_encoder.train.batch=20"]
        assert infeasible_reason(load_recipe("demo", overrides).scaling, nodes) == ""
