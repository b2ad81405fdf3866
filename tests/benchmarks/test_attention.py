"""ContextualAttention beside its plain formulation by conv2d and conv_transpose2d, on one thread: seconds at the features
of a 256 px photograph, peak memory at those of larger ones. `make bench` prints the table."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import ContextualAttention

LIMIT = 6144  # MiB that a formulation may take


def plain(foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """Patches as the kernels of convolutions, photograph by photograph, all scores at once."""
    h, w = foreground.shape[2] // 2, foreground.shape[3] // 2
    eye = torch.eye(3)[None, None]
    ones = torch.ones(h * w, 1, 4, 4)
    done = []
    for f, b, m in zip(foreground.split(1), background.split(1), mask.split(1)):
        kernels = F.unfold(b[:, :, ::2, ::2], 3, padding=1)[0].T
        kernels = kernels / kernels.norm(dim=1, keepdim=True).clamp_min(1e-4)
        scores = F.conv2d(f[:, :, ::2, ::2], kernels.view(h * w, -1, 3, 3), padding=1)  # [1,L,h,w]
        scores = scores.view(1, h * w, h * w)
        for _ in range(2):  # the map is square
            scores = F.conv2d(scores[:, None], eye, padding=1)
            scores = scores.view(h, w, h, w).permute(1, 0, 3, 2).reshape(1, h * w, h * w)
        valid = F.max_pool2d(m[:, :, ::2, ::2], 3, 1, 1).view(1, h * w, 1) == 0
        attention = (10 * scores).masked_fill(~valid, -torch.inf).softmax(1).view(1, h * w, h, w)
        patches = F.unfold(b, 4, stride=2, padding=1)[0].T.reshape(h * w, -1, 4, 4)
        pasted = F.conv_transpose2d(attention, patches, stride=2, padding=1)
        done.append(pasted / F.conv_transpose2d(attention.detach(), ones, stride=2, padding=1))
    return torch.cat(done)


def features(channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    f, b = torch.randn(2, 1, channels, side, side)
    mask = torch.zeros(1, 1, side, side)
    mask[:, :, side // 4 : side // 2, side // 4 : side // 2] = 1
    return f.requires_grad_(), b.requires_grad_(), mask


def seconds(times: int = 7) -> dict[tuple[str, str], float]:
    """The fastest of several calls, taken in turns: what the machine can do undisturbed."""
    f, b, mask = features(128, 64)
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(times):
        for name, call in (("ours", ContextualAttention()), ("plain", plain)):
            start = time.perf_counter()
            with torch.no_grad():
                call(f, b, mask)
            taken.setdefault((name, "forward"), []).append(time.perf_counter() - start)
            start = time.perf_counter()
            call(f, b, mask).sum().backward()
            taken.setdefault((name, "both"), []).append(time.perf_counter() - start)
    return {key: min(values) for key, values in taken.items()}


def resident(field: str) -> float:
    """This process's size in MiB: VmRSS now, VmHWM at most. (getrusage's maximum begins with the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def limit(mib: int) -> None:
    """Let this process ask for so much more memory and no more: the plain formulation takes all that the machine has
    at 1024 px, and other processes with it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def measure(name: str, side: int) -> None:
    """In a process of its own: MiB above what was there before, forward and then forward and backward; the limit where
    that was not enough."""
    torch.set_num_threads(1)
    call = {"ours": ContextualAttention(), "plain": plain}[name]
    call(*features(32, 16)).sum().backward()  # libraries loaded
    f, b, mask = features(32, side)
    limit(LIMIT)
    before = resident("VmRSS")
    for backward in (False, True):
        try:
            with torch.set_grad_enabled(backward):
                done = call(f, b, mask)
            if backward:
                done.sum().backward()
            print(resident("VmHWM") - before, flush=True)
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            print(float(LIMIT), flush=True)


def memory(name: str, side: int) -> list[float]:
    command = [sys.executable, __file__, name, str(side)]
    root = str(Path(__file__).parents[2])  # this tree's models, not those that may be installed
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(x) for x in done.stdout.split()]


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_attention_against_its_plain_formulation(capsys) -> None:
    torch.set_num_threads(1)
    f, b, mask = features(128, 64)
    torch.testing.assert_close(ContextualAttention()(f, b, mask), plain(f, b, mask), atol=1e-4, rtol=1e-4)
    rows = ["one thread, 256 px, 128 channels      ours ms  plain ms  ratio"]
    taken = seconds()
    for what in ("forward", "both"):
        ours, theirs = (taken[name, what] * 1e3 for name in ("ours", "plain"))
        rows.append(f"  {what:33s} {ours:9.1f} {theirs:9.1f} {theirs / ours:6.1f}")
    rows.append(
        f"peak memory, 32 channels             ours MiB plain MiB  ratio (> : more than the {LIMIT} allowed)"
    )
    ratios = []
    for side in (128, 256):
        for what, ours, theirs in zip(("forward", "both"), memory("ours", side), memory("plain", side)):
            more = ">" if theirs >= LIMIT else " "
            ratios.append(theirs / ours)
            rows.append(
                f"  {4 * side:4d} px {what:25s} {ours:9.0f} {more}{theirs:8.0f} {more}{ratios[-1]:5.1f}"
            )
    with capsys.disabled():
        print("\nContextual attention", *rows, sep="\n")
    assert all(taken["ours", what] <= taken["plain", what] for what in ("forward", "both"))
    assert min(ratios[2:]) >= 2


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]))
