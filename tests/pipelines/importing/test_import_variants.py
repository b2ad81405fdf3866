"""Imports: all usual ways to save the weights give the same model as the plain state dict."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, remove_spectral_norm, weight_norm

from pipelines.importing.import_checkpoint import import_checkpoint, parse_settings
from support.importing import (
    State,
    edge_connect_difference,
    import_error,
    largest_difference,
    save_edge_connect,
    scene,
)
from support.public_networks import (
    EdgeConnectGenerator,
    NetG,
    complete_with_edge_connect,
    deepfill_v1,
    edge_connect,
    local_critic,
    partial_conv,
    scrambled,
)

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def lightning(state: State) -> dict[str, Any]:
    critic = {f"discriminator.{key}": value for key, value in local_critic().items()}
    return {
        "epoch": 4,
        "global_step": 1000,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {**prefixed("generator.")(state), **critic, "loss.weight": torch.ones(3)},
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [adam_state(state)],
        "lr_schedulers": [{"gamma": 0.5, "_last_lr": [1e-4]}],
        "hyper_parameters": {"lr": 1e-4, "name": "first", "sizes": [128, 128]},
    }


def adam_state(state: State) -> dict[str, Any]:
    weights = [nn.Parameter(value) for value in state.values() if value.ndim == 4]
    adam = torch.optim.Adam(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam.step()
    return adam.state_dict()


def split_by_child(state: State) -> dict[str, State]:
    """One dictionary per child module."""
    split: dict[str, State] = {}
    for key, value in state.items():
        child, _, name = key.partition(".")
        split.setdefault(child, {})[name] = value
    return split


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def with_cycle(checkpoint: dict[str, Any]) -> dict[str, Any]:
    checkpoint["self"] = [checkpoint]
    return checkpoint


VARIANTS: dict[str, Callable[[State], Any]] = {
    **{
        prefix: prefixed(prefix)
        for prefix in (
            *("generator.", "netG.", "model.", "module.", "_orig_mod.", "G.", "NETG.", "net_g."),
            *("module._orig_mod.", "_orig_mod.module.", "model.generator.module.", "trainer.model.netG."),
        )
    },
    "inner wrappers": lambda s: {
        re.sub(r"(\d)\.(weight|bias)$", r"\1.module._orig_mod.\2", k): v for k, v in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "two deep": lambda s: {"state_dict": {"generator": s, "discriminator": local_critic()}},
    "two deep, other names": lambda s: {"model": {"netG": s, "netD": zeros(local_critic())}, "iter": 7},
    "four deep": lambda s: {"a": {"b": {"c": {"generator": prefixed("module.")(s)}}}},
    "a list": lambda s: [s, local_critic()],
    "a dictionary of lists": lambda s: {"models": [s, local_critic()], "optimizers": [adam_state(s)]},
    "params_ema": lambda s: {"params": zeros(s), "params_ema": s},
    "g_ema": lambda s: {"g": zeros(s), "g_ema": s, "d": local_critic()},
    "model_ema": lambda s: {"model": prefixed("netG.")(zeros(s)), "model_ema": prefixed("netG.")(s)},
    "ema of Lightning": lambda s: {"state_dict": {**prefixed("netG.")(zeros(s)), **prefixed("netG_ema.")(s)}},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(5), **prefixed("module.")(s)},
    "saved twice": lambda s: {"generator": s, "state_dict": {key: value.clone() for key, value in s.items()}},
    "a step beside it": lambda s: {**s, "global_step": torch.tensor(3), "epoch": 7},
    "an optimiser beside it": lambda s: {
        **s,
        "optimizer": adam_state(s),
        "schedule": {"steps": torch.ones(3)},
    },
    "DeepSpeed": lambda s: {"module": s, "ds_version": "0.9", "lr": torch.tensor([0.1])},
    "Lightning": lightning,
    "children": split_by_child,
    "parameters": lambda s: {key: nn.Parameter(v) if v.is_floating_point() else v for key, v in s.items()},
    "no counters": lambda s: {key: value for key, value in s.items() if "num_batches" not in key},
    "sparse": lambda s: {key: v.to_sparse() if v.ndim == 4 else v for key, v in s.items()},
    "channels last": lambda s: {
        key: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for key, v in s.items()
    },
    "float64": lambda s: {
        key: value.double() if value.is_floating_point() else value for key, value in s.items()
    },
    "a numpy number": lambda s: {"state_dict": s, "best": np.float64(0.25), "step": np.int64(7)},
    "a circle": lambda s: with_cycle({"state_dict": s}),
    "numpy's numbers and arrays": lambda s: {
        "generator": s,
        "history": [np.float32(1), np.arange(6).reshape(2, 3), np.array(["a", "b"]), np.bool_(True)],
        "type": np.dtype("float32"),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrappers_around_the_weights_do_not_matter(tmp_path, variant):
    state = scrambled(NetG()).state_dict()
    torch.save(VARIANTS[variant](state), tmp_path / "netG_streetview.pth")
    imported = import_checkpoint("context_encoder", [tmp_path / "netG_streetview.pth"])
    ours = [v for k, v in imported.model.networks["generator"].state_dict().items() if "num_b" not in k]
    theirs = [value for key, value in state.items() if "num_b" not in key]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    averages = any("averages" in note for note in imported.notes)
    assert averages is ("ema" in variant)


@pytest.mark.parametrize("form", ["half", "bfloat16", "old", "renamed", "PTH"])
def test_other_file_formats_are_imported(tmp_path, form):
    """Half precision becomes float32; files of torch before 1.6; safetensors under another suffix; upper case."""
    net = scrambled(NetG())
    state = {k: v.contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    file = tmp_path / ("G.PTH" if form in ("renamed", "PTH") else "g.safetensors")
    if form in ("half", "bfloat16"):
        state = {
            key: value.to(getattr(torch, {"half": "float16"}.get(form, form))) for key, value in state.items()
        }
    if form == "old":
        torch.save({"G": state}, file, _use_new_zipfile_serialization=False)
    elif form == "PTH":
        torch.save(state, file)
    else:
        save_file(state, file)
    settings = parse_settings(["overlap=7", "fill_color=paper"])
    imported = import_checkpoint("context_encoder", [tmp_path], settings)
    assert imported.model.options.overlap == 7
    assert imported.model.options.fill_color == "paper"
    ours = imported.model.networks["generator"].state_dict()
    assert torch.equal(ours["0.weight"], state["main.0.weight"].float())
    assert torch.equal(ours["29.weight"], state["main.29.weight"].float())
    with pytest.raises(ValueError, match="expected OPTION=VALUE"):
        parse_settings(["overlap"])


@pytest.mark.parametrize("size", [64, 256])
@torch.no_grad()
def test_context_encoders_of_other_sizes(tmp_path, size):
    """The number of stride-2 levels is derived from the number of convolutions, also for a single Sequential."""
    levels = size.bit_length() - 3
    down = [*[4] * (levels - 3), 8, 16, 32]
    layers: list[nn.Module] = [nn.Conv2d(3, down[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for a, b in pairwise(down):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(32, 10, 4, bias=False), nn.BatchNorm2d(10), nn.LeakyReLU(0.2)]
    layers += [nn.ConvTranspose2d(10, 32, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    up = down[::-1][: levels - 1]
    for a, b in pairwise(up):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    layers += [nn.ConvTranspose2d(up[-1], 3, 4, 2, 1, bias=False), nn.Tanh()]
    net = nn.Module()
    net.main = nn.Sequential(*layers)
    scrambled(net)
    save_file({key: v.contiguous() for key, v in net.state_dict().items()}, tmp_path / "netG.safetensors")
    imported = import_checkpoint("context_encoder", [tmp_path / "netG.safetensors"])
    assert imported.size == imported.model.options.size == size
    x = torch.rand(2, 3, size, size) * 2 - 1
    torch.testing.assert_close(imported.model.networks["generator"](x), net.main(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_spectral_norm_that_our_network_lacks_is_folded(tmp_path):
    """Spectral norm on all layers, transposed convolutions included, is folded into the weights."""
    net = NetG()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.utils.spectral_norm(layer)
    for _ in range(2):  # u and v have not converged
        net(torch.rand(2, 3, 128, 128))
    scrambled(net)
    torch.save({"netG": net.state_dict()}, tmp_path / "netG.pth")
    imported = import_checkpoint("context_encoder", [tmp_path / "netG.pth"])
    x = torch.rand(1, 3, 128, 128, dtype=torch.double) * 2 - 1
    theirs = net.double()(x)
    assert theirs.std() > 0.02
    torch.testing.assert_close(imported.model.double().networks["generator"](x), theirs, atol=1e-5, rtol=0)


# -- edge_connect ------------------------------------------------------------------------------------------------


def remove_spectral_norms(g1: EdgeConnectGenerator) -> EdgeConnectGenerator:
    """A copy of G1 with its normalized weights and without spectral norm."""
    for layer in (plain := copy.deepcopy(g1)).modules():
        if hasattr(layer, "weight_orig"):
            remove_spectral_norm(layer)
    return plain


def folded(g1: EdgeConnectGenerator) -> State:
    return remove_spectral_norms(g1).state_dict()


def parametrized(g1: EdgeConnectGenerator) -> State:
    """The same weights, u and v under torch's newer parametrization."""
    renamed = {}
    for key, value in g1.state_dict().items():
        for old, new in (("weight_orig", "original"), ("weight_u", "0._u"), ("weight_v", "0._v")):
            key = key.replace(old, f"parametrizations.weight.{new}")
        renamed[key] = value
    return renamed


def as_torch_0_4_1(g1: EdgeConnectGenerator) -> State:
    """torch 0.4.1 also stored the normalized weight, and no v."""
    state = {key: value for key, value in g1.state_dict().items() if not key.endswith("weight_v")}
    return state | {key: value for key, value in folded(g1).items() if key.endswith("weight")}


def weight_normed(g1: EdgeConnectGenerator) -> State:
    """The same weights under both implementations of weight norm."""
    plain = remove_spectral_norms(g1)
    for i, layer in enumerate(layer for layer in plain.modules() if isinstance(layer, nn.Conv2d)):
        (parametrizations.weight_norm if i % 2 else weight_norm)(layer)
    names = plain.state_dict()
    assert "encoder.1.weight_g" in names
    assert "encoder.4.parametrizations.weight.original1" in names
    return names


NORM_VARIANTS = {
    "hooks": lambda g1: g1.state_dict(),
    "folded": folded,
    "parametrised": parametrized,
    "torch 0.4.1": as_torch_0_4_1,
    "weight norm": weight_normed,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("form", NORM_VARIANTS)
@torch.no_grad()
def test_g1_with_and_without_spectral_norm(tmp_path, form):
    """The two generators are distinguished by their channels, in any order and under any file names."""
    g1, g2 = edge_connect()
    torch.save({"generator": NORM_VARIANTS[form](g1)}, tmp_path / "a.pth")
    torch.save({"generator": g2.state_dict()}, tmp_path / "b.pth")
    order = ["a.pth", "b.pth"] if form in ("hooks", "folded") else ["b.pth", "a.pth"]
    imported = import_checkpoint("edge_connect", [tmp_path / name for name in order])
    image, mask = (x.double() for x in scene(32))
    edge = (torch.rand(1, 1, 32, 32) < 0.1).double() * (1 - mask)
    imported.model.double()
    theirs = complete_with_edge_connect(g1.double(), g2.double(), image, mask, edge)
    # folded weights were rounded to float32
    assert largest_difference(imported, theirs, image, mask, edge) < (
        1e-12 if form in ("hooks", "parametrised") else 1e-5
    )


@torch.no_grad()
def test_generators_with_other_norms_are_imported(tmp_path):
    """A G1 without spectral norm has biases, which instance norm cancels; a G2 with spectral norm has none."""
    g1, _ = edge_connect(spectral=False)
    g2 = scrambled(EdgeConnectGenerator(4, 3, True))
    g2.decoder[-1].weight.data.mul_(0.3)
    both = {"edge_generator": g1.state_dict(), "inpaint_generator": g2.state_dict()}
    assert "middle.0.conv_block.1.bias" in both["edge_generator"]
    assert "middle.0.conv_block.1.bias" not in both["inpaint_generator"]
    torch.save(both, tmp_path / "both.pth")
    imported = import_checkpoint("edge_connect", [tmp_path / "both.pth"])
    assert edge_connect_difference(imported, g1, g2) < 1e-5


@torch.no_grad()
def test_one_state_dict_of_all_networks_is_imported(tmp_path):
    """EdgeConnect as one module: both generators and both discriminators, each with its own prefix."""
    g1, g2 = edge_connect()
    critic = {"conv1.0.weight_orig": torch.rand(8, 3, 4, 4), "features.0.weight_orig": torch.rand(8, 3, 4, 4)}
    parts = {"edge_model.generator": g1.state_dict(), "inpaint_model.generator": g2.state_dict()}
    parts |= {"edge_model.discriminator": critic, "inpaint_model.discriminator": critic}
    flat = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    torch.save(flat, tmp_path / "edge_connect.ckpt")
    imported = import_checkpoint("edge_connect", [tmp_path / "edge_connect.ckpt"])
    assert edge_connect_difference(imported, g1, g2) < 1e-5


@torch.no_grad()
def test_a_g2_without_edges_is_imported(tmp_path):
    """3 input and 3 output channels: the model without edges, which needs no G1."""
    g2 = scrambled(EdgeConnectGenerator(3, 3, False))
    g2.decoder[-1].weight.data.mul_(0.3)
    torch.save({"generator": g2.state_dict()}, tmp_path / "InpaintingModel_gen.pth")
    imported = import_checkpoint("edge_connect", [tmp_path])
    assert imported.options["edge_input"] == "none"
    image, mask = scene(32)
    theirs = (torch.tanh(g2(image * (1 - mask) + mask)) + 1) / 2
    assert largest_difference(imported, theirs, image, mask) < 1e-5


# -- several files -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_files_in_a_folder_are_ignored(tmp_path):
    """Files that are not part of the model are ignored; the same network in two files is refused."""
    g1, _ = save_edge_connect(tmp_path)
    (tmp_path / "LICENSE").write_text("CC BY-NC 4.0\n")
    (tmp_path / "notes.pth").write_bytes(b"\x00" * 40)
    torch.save({"model": partial_conv().state_dict()}, tmp_path / "other.pth")
    imported = import_checkpoint("edge_connect", [tmp_path, tmp_path / "EdgeModel_gen.pth"])
    assert [name for name, _ in imported.files] == ["EdgeModel_gen.pth", "InpaintingModel_gen.pth"]
    assert "are damaged" not in " ".join(imported.notes)
    torch.save(g1.state_dict(), tmp_path / "EdgeModel_gen_2.pth")
    assert "both hold the edge_generator" in import_error("edge_connect", tmp_path)
    (tmp_path / "EdgeModel_gen_2.pth").unlink()
    (tmp_path / "EdgeModel_gen.pth").write_bytes((tmp_path / "EdgeModel_gen.pth").read_bytes()[:-500])
    assert "EdgeModel_gen.pth is damaged: its end is missing" in import_error("edge_connect", tmp_path)


def test_all_files_of_a_training_run_may_be_named(tmp_path):
    """As a shell expands them: the discriminator's and the optimizer's files are skipped."""
    state = deepfill_v1().state_dict()
    torch.save(state, tmp_path / "gen_00430000.pt")
    torch.save(
        {"localD": {"dis_conv_module.conv1.conv.weight": torch.zeros(4, 3, 5, 5)}},
        tmp_path / "dis_00430000.pt",
    )
    torch.save({"gen": adam_state(state), "dis": adam_state(state)}, tmp_path / "optimizer.pt")
    imported = import_checkpoint("deepfill_v1", sorted(tmp_path.iterdir()))
    assert [name for name, _ in imported.files] == ["gen_00430000.pt"]


def test_dictionaries_left_out_are_listed(tmp_path):
    state = scrambled(NetG()).state_dict()
    torch.save({**state, "schedule": {"steps": torch.ones(3)}, "n": {"a": 1}}, tmp_path / "netG.pth")
    imported = import_checkpoint("context_encoder", [tmp_path / "netG.pth"])
    assert imported.notes[-1] == "left out of netG.pth, beside the network: schedule"


def test_a_file_with_the_same_network_twice_is_refused(tmp_path):
    state = deepfill_v1().state_dict()
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"best": state, "last": other}, tmp_path / "gen.pt")
    message = import_error("deepfill_v1", tmp_path / "gen.pt")
    assert "holds the generator 2 times (best, last): save the one you want in a file of its own" in message
    torch.save({**state, **{f"module.{key}": value for key, value in other.items()}}, tmp_path / "gen.pt")
    assert "holds the generator 2 times (no prefix, module)" in import_error(
        "deepfill_v1", tmp_path / "gen.pt"
    )
