"""The training loop without Ray, for torchrun: `torchrun --nproc-per-node 2 bare_loop.py JOB.pickle STEPS EVERY`.

Rank 0 prints the mean seconds per step of each EVERY steps, as JSON. The pickled job comes from test_training.py.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

import torch.distributed as dist

from pipelines.training.loop import make_learner, make_stream


def main() -> None:
    job, steps, every = pickle.loads(Path(sys.argv[1]).read_bytes()), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    learner = make_learner(job, rank, world_size)
    stream, seconds, start = make_stream(job, rank, world_size), [], time.perf_counter()
    for step, batch in enumerate(stream.iter_batches(0, steps)):
        learner.step(step, batch.as_dict())
        if (step + 1) % every == 0:
            now = time.perf_counter()
            seconds.append((now - start) / every)
            start = now
    if rank == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
