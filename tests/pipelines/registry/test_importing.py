"""Importing: every layout, as an independent network of its names and order computes it; refusals; the command line.

The networks are those of public_networks.py.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from public_networks import (
    Completion,
    DeepFill2,
    EdgeConnectGenerator,
    NetG,
    added,
    at_least,
    deepfill_v1,
    edge_connect,
    edge_connect_completes,
    partial_conv,
    scrambled,
)
from safetensors.torch import save_file
from torch import Tensor

from data_prep.canny import canny_edges
from pipelines import registry
from pipelines.__main__ import main, parser
from pipelines.registry.importing import Imported, import_checkpoint, parse_settings
from pipelines.registry.layouts import LAYOUTS

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def scene(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth photograph [1,3,S,S] and a hole [1,1,S,S] off its centre, not touching multiples of 8."""
    noise = torch.rand(1, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)
    mask = torch.zeros(1, 1, size, size)
    mask[:, :, size * 3 // 8 + 1 : size * 5 // 8 + 3, size // 4 : size * 5 // 8 - 2] = 1
    return image, mask


def same(
    imported: Imported, theirs: Tensor, image: Tensor, mask: Tensor, edge: Tensor | None = None
) -> float:
    """The largest difference of our completion from their output, both in [0,1], which must show something."""
    hole = mask.expand_as(image) > 0
    assert theirs[hole].std() > 0.02, "their output says nothing"
    assert ((theirs > 0) & (theirs < 1))[hole].float().mean() > 0.5, "their output is clipped"
    ours = imported.model.complete(image, mask, edge)
    assert torch.equal(ours[~hole], image[~hole])
    return float((ours - torch.where(hole, theirs, image)).abs().max())


# -- edge_connect ----------------------------------------------------------------------------------------------


def save_edge_connect(folder: Path, prefix: str = "") -> tuple[EdgeConnectGenerator, EdgeConnectGenerator]:
    g1, g2 = edge_connect()
    for name, net in (("EdgeModel", g1), ("InpaintingModel", g2)):
        state = {prefix + key: value for key, value in net.state_dict().items()}
        torch.save({"iteration": 7, "generator": state}, folder / f"{name}_gen.pth")
        critic = {"conv1.0.weight_orig": torch.zeros(8, 3, 4, 4), "conv1.0.weight_u": torch.zeros(8)}
        torch.save({"discriminator": critic}, folder / f"{name}_dis.pth")
    return g1, g2


@pytest.mark.parametrize("prefix", ["", "module."])  # as saved under DataParallel
@torch.no_grad()
def test_edge_connect(tmp_path, prefix):
    g1, g2 = save_edge_connect(tmp_path, prefix)
    imported = import_checkpoint("edge_connect", [tmp_path])
    assert imported.options == {"width": 0.125, "residual_blocks": 2}
    assert imported.size == 256
    assert {name for name, _ in imported.files} == {"EdgeModel_gen.pth", "InpaintingModel_gen.pth"}
    image, mask = scene(32)
    edge = (torch.rand(1, 1, 32, 32) < 0.1).float() * (1 - mask)
    theirs = edge_connect_completes(g1, g2, image, mask, edge)
    assert same(imported, theirs, image, mask, edge) < 1e-5


def test_one_of_edge_connects_files(tmp_path):
    """Alone it is refused, unless a model that needs no other is asked for."""
    _, g2 = save_edge_connect(tmp_path)
    file = tmp_path / "InpaintingModel_gen.pth"
    with pytest.raises(
        ValueError, match=r"needs EdgeModel_gen\.pth too: name it beside InpaintingModel_gen\.pth"
    ):
        import_checkpoint("edge_connect", [file])
    imported = import_checkpoint("edge_connect", [file], {"edges": "canny"})
    image, mask = scene(32)
    edge = (torch.rand(1, 1, 32, 32) < 0.1).float()
    with torch.no_grad():
        theirs = (torch.tanh(g2(torch.cat([image * (1 - mask) + mask, edge], 1))) + 1) / 2
    assert same(imported, theirs, image, mask, edge) < 1e-5


# -- deepfill --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_deepfill_v1(tmp_path):
    net = deepfill_v1()
    torch.save(net.state_dict(), tmp_path / "gen_00430000.pt")
    torch.save(
        {"localD": {"dis_conv_module.conv1.conv.weight": torch.zeros(4, 3, 5, 5)}}, tmp_path / "dis_1.pt"
    )
    optimiser = torch.optim.Adam(net.parameters())
    torch.save({"gen": optimiser.state_dict()}, tmp_path / "optimizer.pt")
    imported = import_checkpoint("deepfill_v1", [tmp_path])
    assert imported.options["width"] == 0.125
    assert [name for name, _ in imported.files] == ["gen_00430000.pt"]
    image, mask = scene(64)
    assert same(imported, net(image, mask, at_least), image, mask) < 1e-5
    difference = same(imported, net(image, mask, added), image, mask)
    assert difference < 0.01, "what the note says of the port's norms"


@pytest.mark.parametrize("branches", [("conv_", "ca_"), ("b1_", "b2_")])
@torch.no_grad()
def test_deepfill_v2(tmp_path, branches):
    net = scrambled(DeepFill2(branches=branches))
    critic = {"conv1.conv_sn.parametrizations.weight.original": torch.zeros(8, 4, 5, 5)}
    state = {"G": net.state_dict(), "D": critic, "G_optim": {"state": {}, "param_groups": []}, "n_iter": 3}
    torch.save(state, tmp_path / "states.pth")
    imported = import_checkpoint("deepfill_v2", [tmp_path / "states.pth"])
    assert imported.options == {"width": 8 / 48, "attention": "released"}
    image, mask = scene(64)
    assert same(imported, net(image, mask), image, mask) < 1e-5


# -- glcic -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_glcic(tmp_path):
    """Batch norm behind the activation is folded away, exactly, up to the border that zeros are padded to."""
    net = scrambled(Completion())
    torch.save(net.state_dict(), tmp_path / "model_cn_step400000")
    torch.save({"model_ld.conv1.weight": torch.zeros(4, 3, 5, 5)}, tmp_path / "model_cd_step400000")
    (tmp_path / "config.json").write_text('{"mpv": [0.5, 0.4, 0.3], "cn_input_size": 96, "arc": "celeba"}')
    imported = import_checkpoint("glcic", [tmp_path])
    assert imported.size == 96
    assert imported.options["mean_colour"] == [0.5, 0.4, 0.3]
    image, mask = scene(32)
    mask[:, :, 20:, 25:] = 1  # to the corner
    mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    theirs = net(torch.cat([image * (1 - mask) + mean * mask, mask], 1))
    assert same(imported, theirs, image, mask) < 1e-5


# -- context_encoder -------------------------------------------------------------------------------------------


def save_context_encoder(path: Path) -> NetG:
    net = scrambled(NetG())
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, path)
    return net


@torch.no_grad()
def test_context_encoder(tmp_path):
    net = save_context_encoder(tmp_path / "netG_streetview.pth")
    imported = import_checkpoint("context_encoder", [tmp_path / "netG_streetview.pth"])
    assert imported.size == 128
    assert imported.model.options.width == 0.0625
    image, _ = scene(128)
    mask = torch.zeros(1, 1, 128, 128)
    mask[:, :, 36:92, 36:92] = 1  # all that the port blanks
    seen = torch.where(
        mask > 0, torch.tensor([117.0, 104.0, 123.0]).view(1, 3, 1, 1) / 127.5 - 1, image * 2 - 1
    )
    theirs = F.pad((net(seen) + 1) / 2, (32, 32, 32, 32))
    assert same(imported, theirs, image, mask) < 1e-5


# -- partial_conv ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_partial_conv(tmp_path):
    """1/sum(M) and sum(1)/sum(M) are the same function when weights are divided by sum(1)."""
    net = partial_conv()
    net.dec_1.conv.input_conv.weight.data.mul_(0.3)
    torch.save({"n_iter": 9, "model": net.state_dict(), "optimizer": {"state": {}}}, tmp_path / "1000000.pth")
    imported = import_checkpoint("partial_conv", [tmp_path / "1000000.pth"])
    assert imported.size == 32
    assert imported.options["levels"] == 4
    image, mask = scene(32)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    valid = (1 - mask).expand(-1, 3, -1, -1)
    theirs = net((image - mean) / std, valid) * std + mean
    assert same(imported, theirs, image, mask) < 1e-5


# -- refusals and the command ----------------------------------------------------------------------------------


class Sly:
    """What a pickle can do when it is read: make a folder, here."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.folder,)


def v1(path: Path, change: Callable[[State], Any]) -> Path:
    state = deepfill_v1().state_dict()
    change(state)
    torch.save(state, path)
    return path


def refused(name: str, *files: Path, **options: Any) -> str:
    """The error's text, which is one line."""
    with pytest.raises(ValueError) as error:
        import_checkpoint(name, files, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_listed(tmp_path):
    def change(state: State) -> None:
        for n in range(1, 8):
            state[f"new{n}.weight"] = torch.zeros(1)
        del state["fine_generator.pmconv9.conv.bias"]
        state["coarse_generator.conv3.conv.weight"] = torch.zeros(8, 8, 5, 5)

    said = refused("deepfill_v1", v1(tmp_path / "gen_1.pt", change))
    assert "1 missing (fine_generator.pmconv9.conv.bias)" in said
    assert "7 not used (new1.weight, new2.weight, new3.weight, new4.weight, new5.weight ...)" in said
    assert (
        "1 of another shape (coarse_generator.conv3.conv.weight [8, 8, 5, 5] instead of [8, 8, 3, 3])" in said
    )


def test_other_files_are_refused(tmp_path):
    file = v1(tmp_path / "gen_1.pt", lambda state: None)
    assert "did you mean 'deepfill_v1'?" in refused("deepfil_v1", file)
    assert "there are context_encoder" in refused("lama", file)
    assert "looks like deepfill_v1's" in refused("deepfill_v2", file)
    assert "no generator of" in refused("deepfill_v2", tmp_path)
    assert "there is no file" in refused("deepfill_v1", tmp_path / "gen_2.pt")
    (tmp_path / "gen_2.pt").write_bytes(file.read_bytes())
    assert "both hold the generator" in refused("deepfill_v1", tmp_path)
    (tmp_path / "gen_2.pt").write_bytes(file.read_bytes()[:-1000])
    assert "is refused, damaged" in refused("deepfill_v1", tmp_path / "gen_2.pt")
    torch.save(torch.zeros(3), tmp_path / "gen_2.pt")
    assert "holds a Tensor, not a state dict" in refused("deepfill_v1", tmp_path / "gen_2.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "config": Sly(tmp_path / "made")}, tmp_path / "gen_2.pt")
    assert "holds a Python object (os.makedirs)" in refused("deepfill_v1", tmp_path / "gen_2.pt")
    (tmp_path / "gen_2.pt").write_bytes(pickle.dumps({"config": Sly(tmp_path / "made")}))
    assert "only what can be read safely is imported" in refused("deepfill_v1", tmp_path / "gen_2.pt")
    assert not (tmp_path / "made").exists()

    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "are not those of EdgeModel_gen.pth" in refused("edge_connect", tmp_path / "other.safetensors")
    said = refused("glcic", tmp_path / "other.safetensors")
    assert "98 missing (conv1.weight, conv1.bias, bn1.weight, bn1.bias, bn1.running_mean ...)" in said
    assert "1 not used (conv.weight)" in said
    torch.save({"G": {"xconv1.conv.weight": torch.zeros(4, 3, 5, 5)}}, tmp_path / "states_tf.pth")
    assert "pads stride-2 layers as TensorFlow does" in refused("deepfill_v2", tmp_path / "states_tf.pth")
    torch.save({"enc_1.conv.conv2d.weight": torch.zeros(4, 3, 7, 7)}, tmp_path / "early.pth")
    assert "the first layer's has no place" in refused("partial_conv", tmp_path / "early.pth")

    v1(tmp_path / "gen_2.pt", lambda state: state["coarse_generator.conv3.conv.bias"].fill_(torch.nan))
    assert "not finite" in refused("deepfill_v1", tmp_path / "gen_2.pt")
    assert "no option 'atention'" in refused("deepfill_v1", file, settings={"atention": True})
    assert "did you mean 'attention" in refused("deepfill_v1", file, settings={"atention": True})


def test_safetensors_half_precision_and_settings(tmp_path):
    net = scrambled(NetG())
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()
    }
    save_file(
        {k: v.contiguous() for k, v in state.items() if "num_batches" not in k}, tmp_path / "g.safetensors"
    )
    settings = parse_settings(["overlap=7", "fill=paper"])
    imported = import_checkpoint("context_encoder", [tmp_path / "g.safetensors"], settings)
    assert imported.model.options.overlap == 7
    assert imported.model.options.fill == "paper"
    ours = imported.model.networks["generator"].state_dict()
    assert torch.equal(ours["0.weight"], state["main_encode.0.weight"].float())
    with pytest.raises(ValueError, match="expected OPTION=VALUE"):
        parse_settings(["overlap"])


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_the_command(tmp_path, capsys):
    """Registers a version that completes photographs, once however often it is run."""
    (tmp_path / "weights").mkdir()
    g1, g2 = save_edge_connect(tmp_path / "weights")
    first = hashlib.sha256((tmp_path / "weights" / "EdgeModel_gen.pth").read_bytes()).hexdigest()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = ("import", "edge_connect", str(tmp_path / "weights"), "--name", "places", "--sigma", "1.5")
    for attempt in range(3):
        if attempt == 2:  # the same weights, in a file of other bytes
            rewritten = tmp_path / "weights" / "EdgeModel_gen.pth"
            torch.save({"generator": g1.state_dict()}, rewritten)
        assert run(*command, "--tracking", uri) == 0
        out = capsys.readouterr().out
        assert "places version 1, candidate: EdgeModel_gen.pth, InpaintingModel_gen.pth" in out
        assert "residual_blocks 2" in out
        assert "licence: CC BY-NC 4.0" in out
        assert (
            f"next: inpaint fill models:/places/1 photo.jpg mask.png --out filled.png --tracking {uri}" in out
        )
    (row,) = registry.show("places", uri)["versions"]
    assert row["aliases"] == ["candidate"]
    assert row["tags"]["inpaint.imported"] == "knazeri/edge-connect"
    params = MlflowClient(uri).get_run(row["run_id"]).data.params
    assert params["sha256"].startswith(first + ", ")
    assert params["layout"] == "edge_connect"

    model = registry.load_model("models:/places@candidate", tracking_uri=uri)
    assert model.sigma == 1.5
    assert model.size == 256
    image, mask = scene(32)
    photo = np.round(image[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    hole = mask[0, 0].numpy() > 0
    filled = model.complete(photo, hole)
    edge = torch.from_numpy(canny_edges(photo, 1.5, mask=hole))[None, None].float()
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    theirs = edge_connect_completes(g1, g2, image, mask, edge)[0].permute(1, 2, 0).numpy() * 255
    assert np.array_equal(filled[~hole], photo[~hole])
    assert np.abs(filled.astype(float) - theirs)[hole].max() < 0.51

    assert run(*command, "--tracking", uri, "--sigma", "0") == 1
    assert "sigma 0 is not positive" in capsys.readouterr().err
    assert run("import", "edge_connect", str(tmp_path / "nowhere"), "--tracking", uri) == 1
    assert capsys.readouterr().err.startswith("inpaint import: there is no file")


def test_the_command_names_every_layout():
    (commands,) = [action for action in parser()._actions if action.dest == "command"]
    said = commands.choices["import"].format_help()
    assert "example: inpaint import edge_connect" in said
    assert all(name in said for name in LAYOUTS)
