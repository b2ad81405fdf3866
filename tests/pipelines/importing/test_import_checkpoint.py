"""Imports of every layout, compared with independent public networks (support/public_networks.py); the command."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient

from data_prep.canny import canny_edges
from pipelines import registry
from pipelines.cli.main import build_parser, main
from pipelines.importing.import_checkpoint import import_checkpoint
from pipelines.importing.layouts import all_layouts
from support.importing import edge_connect_difference, largest_difference, save_edge_connect, scene
from support.public_networks import (
    Completion,
    NetG,
    clamped_norm,
    complete_with_edge_connect,
    deepfill_v1,
    deepfill_v2,
    local_critic,
    norm_with_epsilon,
    partial_conv,
    scrambled,
)

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


# -- edge_connect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])  # as saved under DataParallel
@torch.no_grad()
def test_edge_connect(tmp_path, prefix):
    g1, g2 = save_edge_connect(tmp_path, prefix)
    imported = import_checkpoint("edge_connect", [tmp_path])
    assert imported.options == {"width": 0.125, "residual_blocks": 2}
    assert imported.size == 256
    assert {name for name, _ in imported.files} == {"EdgeModel_gen.pth", "InpaintingModel_gen.pth"}
    assert edge_connect_difference(imported, g1, g2) < 1e-5


def test_one_file_of_edge_connect(tmp_path):
    """It is refused, unless the options make a model that needs only this file."""
    _, g2 = save_edge_connect(tmp_path)
    file = tmp_path / "InpaintingModel_gen.pth"
    with pytest.raises(
        ValueError, match=r"needs EdgeModel_gen\.pth too: name it beside InpaintingModel_gen\.pth"
    ):
        import_checkpoint("edge_connect", [file])
    imported = import_checkpoint("edge_connect", [file], {"edge_input": "canny"})
    image, mask = scene(32)
    edge = (torch.rand(1, 1, 32, 32) < 0.1).float()
    with torch.no_grad():
        theirs = (torch.tanh(g2(torch.cat([image * (1 - mask) + mask, edge], 1))) + 1) / 2
    assert largest_difference(imported, theirs, image, mask, edge) < 1e-5


# -- deepfill --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_deepfill_v1(tmp_path):
    net = deepfill_v1()
    torch.save(net.state_dict(), tmp_path / "gen_00430000.pt")
    torch.save(
        {"localD": {"dis_conv_module.conv1.conv.weight": torch.zeros(4, 3, 5, 5)}}, tmp_path / "dis_1.pt"
    )
    optimizer = torch.optim.Adam(net.parameters())
    torch.save({"gen": optimizer.state_dict()}, tmp_path / "optimizer.pt")
    imported = import_checkpoint("deepfill_v1", [tmp_path])
    assert imported.options["width"] == 0.125
    assert imported.options["attention_norm"] == "smooth"
    assert [name for name, _ in imported.files] == ["gen_00430000.pt"]
    image, mask = scene(64)
    assert largest_difference(imported, net(image, mask, norm_with_epsilon), image, mask) < 1e-5
    image, mask = image.double(), mask.double()
    imported.model.double()
    net.double()
    assert largest_difference(imported, net(image, mask, norm_with_epsilon), image, mask) < 1e-13
    released = import_checkpoint("deepfill_v1", [tmp_path], {"attention_norm": "released"})
    released.model.double()
    assert largest_difference(released, net(image, mask, clamped_norm), image, mask) < 1e-13
    assert largest_difference(released, net(image, mask, norm_with_epsilon), image, mask) > 1e-5, (
        "both norms give the same output"
    )


@pytest.mark.parametrize("branches", [("conv_", "ca_"), ("b1_", "b2_")])
@torch.no_grad()
def test_deepfill_v2(tmp_path, branches):
    net = deepfill_v2(branches)
    critic = {"conv1.conv_sn.parametrizations.weight.original": torch.zeros(8, 4, 5, 5)}
    state = {"G": net.state_dict(), "D": critic, "G_optim": {"state": {}, "param_groups": []}, "n_iter": 3}
    torch.save(state, tmp_path / "states.pth")
    imported = import_checkpoint("deepfill_v2", [tmp_path / "states.pth"])
    first = branches[0] == "b1_"
    assert imported.options == {"width": 8 / 48, "attention": "smooth" if first else "released"}
    image, mask = (x.double() for x in scene(64))
    imported.model.double()
    assert largest_difference(imported, net.double()(image, mask), image, mask) < 1e-12


@torch.no_grad()
def test_deepfill_v2_guided(tmp_path):
    net = deepfill_v2(guided=True)
    torch.save({"G": net.state_dict()}, tmp_path / "guided.pth")
    imported = import_checkpoint("deepfill_v2", [tmp_path / "guided.pth"])
    assert imported.options["guided"] is True
    image, mask = (x.double() for x in scene(64))
    sketch = (torch.rand(1, 1, 64, 64) < 0.3).double()
    imported.model.double()
    drawn = net.double()(image, mask, sketch)
    assert largest_difference(imported, drawn, image, mask, sketch) < 1e-12
    assert (drawn - net(image, mask, 0 * sketch)).abs().max() > 0.01, "the sketch has no effect"


# -- glcic -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_glcic(tmp_path):
    """Batch norm after the activation is folded exactly, up to the zero-padded border."""
    net = scrambled(Completion())
    torch.save(net.state_dict(), tmp_path / "model_cn_step400000")
    torch.save({"model_ld.conv1.weight": torch.zeros(4, 3, 5, 5)}, tmp_path / "model_cd_step400000")
    (tmp_path / "config.json").write_text('{"mpv": [0.5, 0.4, 0.3], "cn_input_size": 96, "arc": "celeba"}')
    imported = import_checkpoint("glcic", [tmp_path])
    assert imported.size == 96
    assert imported.options["mean_color"] == [0.5, 0.4, 0.3]
    image, mask = scene(32)
    mask[:, :, 20:, 25:] = 1  # to the corner
    mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    theirs = net(torch.cat([image * (1 - mask) + mean * mask, mask], 1))
    assert largest_difference(imported, theirs, image, mask) < 1e-5


# -- context_encoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_context_encoder(tmp_path, split):
    """As in the repository and as in a pull request; beside its discriminator, whose first keys are the same."""
    net = scrambled(NetG(split=split))
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "netG_streetview.pth")
    torch.save({"epoch": 3, "state_dict": local_critic()}, tmp_path / "netlocalD.pth")
    assert ("main.29.weight" in net.state_dict()) is not split
    imported = import_checkpoint("context_encoder", [tmp_path])
    assert imported.size == 128
    assert imported.model.options.width == 0.0625
    image, _ = scene(128)
    mask = torch.zeros(1, 1, 128, 128)
    mask[:, :, 36:92, 36:92] = 1  # all pixels that the port blanks
    network_input = torch.where(
        mask > 0, torch.tensor([117.0, 104.0, 123.0]).view(1, 3, 1, 1) / 127.5 - 1, image * 2 - 1
    )
    theirs = F.pad((net(network_input) + 1) / 2, (32, 32, 32, 32))
    assert largest_difference(imported, theirs, image, mask) < 1e-5


# -- partial_conv ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_partial_conv(tmp_path):
    """1/sum(M) and sum(1)/sum(M) give the same function if the weights are divided by sum(1)."""
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
    assert largest_difference(imported, theirs, image, mask) < 1e-5


# -- the command ------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_command_registers_one_version(tmp_path, capsys):
    """Repeated imports register a single version, which completes photographs."""
    (tmp_path / "weights").mkdir()
    g1, g2 = save_edge_connect(tmp_path / "weights")
    first = hashlib.sha256((tmp_path / "weights" / "EdgeModel_gen.pth").read_bytes()).hexdigest()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = (
        "import",
        "edge_connect",
        str(tmp_path / "weights"),
        "--register-as",
        "places",
        "--sigma",
        "1.5",
    )
    for attempt in range(3):
        if attempt == 2:  # the same weights in a file with other bytes
            rewritten = tmp_path / "weights" / "EdgeModel_gen.pth"
            torch.save({"generator": g1.state_dict()}, rewritten)
        assert run(*command, "--tracking-uri", uri) == 0
        out = capsys.readouterr().out
        assert "places version 1, candidate: EdgeModel_gen.pth, InpaintingModel_gen.pth" in out
        assert "residual_blocks 2" in out
        assert "licence: CC BY-NC 4.0" in out
        assert (
            f"next: inpaint fill models:/places/1 photo.jpg mask.png --out filled.png --tracking-uri {uri}"
            in out
        )
    (row,) = registry.show("places", uri).versions
    assert row.aliases == ("candidate",)
    assert row.tags["inpaint.imported"] == "knazeri/edge-connect"
    params = MlflowClient(uri).get_run(row.run_id).data.params
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
    theirs = complete_with_edge_connect(g1, g2, image, mask, edge)[0].permute(1, 2, 0).numpy() * 255
    assert np.array_equal(filled[~hole], photo[~hole])
    assert np.abs(filled.astype(float) - theirs)[hole].max() < 0.51

    assert run(*command, "--tracking-uri", uri, "--sigma", "0") == 1
    assert "sigma 0 is not positive" in capsys.readouterr().err
    assert run("import", "edge_connect", str(tmp_path / "nowhere"), "--tracking-uri", uri) == 1
    assert capsys.readouterr().err.startswith("inpaint import: there is no file")


def test_the_command_names_every_layout(capsys):
    (commands,) = [action for action in build_parser()._actions if action.dest == "command"]
    assert "example: inpaint import edge_connect" in commands.choices["import"].format_help()
    assert run("import", "x", "nowhere.pth") == 1
    message = capsys.readouterr().err
    assert len(all_layouts()) == 6
    assert f"inpaint import: no layout 'x' to import from: there are {', '.join(all_layouts())}" in message
