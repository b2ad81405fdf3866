"""The training loop without Ray, for torchrun: `torchrun --nproc-per-node 2 bare_loop.py JOB.pickle STEPS EVERY`.

Prints the seconds of a step between every EVERY steps, as rank 0 sees them; the job is of this benchmark's own making.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

import torch.distributed as dist

from pipelines.training.train import make_learner, make_stream


def main() -> None:
    job, steps, every = pickle.loads(Path(sys.argv[1]).read_bytes()), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    learner = make_learner(job, rank, world)
    stream, seconds, since = make_stream(job, rank, world), [], time.perf_counter()
    for step, batch in enumerate(stream.batches(0, steps)):
        learner.step(step, batch)
        if (step + 1) % every == 0:
            now = time.perf_counter()
            seconds.append((now - since) / every)
            since = now
    if rank == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
