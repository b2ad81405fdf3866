"""Checks that a training's workers fit on the nodes: for resources that no node has, Ray waits forever, silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.recipe import Scaling

ROUNDING = 1e-9


def infeasible_reason(scaling: Scaling, nodes: Sequence[Mapping[str, float]]) -> str:
    """Why the minimum number of workers does not fit on these nodes, and the remedy; '' if they fit.

    nodes: resource -> amount, per node.
    """
    per_worker = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    per_worker = {kind: amount for kind, amount in per_worker.items() if amount}
    capacity = sum(
        int(min(node.get(kind, 0) / amount + ROUNDING for kind, amount in per_worker.items()))
        for node in nodes
    )
    if capacity >= scaling.min_workers:
        return ""
    worker_needs = " and ".join(f"{amount:g} {kind}" for kind, amount in per_worker.items())
    node_resources = "; ".join(
        ", ".join(f"{node.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")) for node in nodes[:5]
    )
    available = (
        f"the {len(nodes)} nodes have {node_resources}" if len(nodes) > 1 else f"there are {node_resources}"
    )
    if capacity:
        remedy = f"--set scaling.workers={capacity}"
    else:
        largest = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in per_worker}
        missing = [kind for kind, amount in per_worker.items() if largest[kind] < amount] or ["CPU"]
        remedy = " ".join(f"--set scaling.{kind.lower()}s_per_worker={largest[kind]:g}" for kind in missing)
        if largest["CPU"] == 0:
            remedy = "a node with CPUs"
    return (
        f"scaling.workers = {scaling.min_workers} with {worker_needs} each do not fit: {available}; "
        f"use {remedy}, or a larger cluster"
    )
