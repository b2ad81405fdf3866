"""Model cards: what they say for any record, also an old one, and MLflow's limit on their length."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from pipelines import registry
from pipelines.registry.alias_moves import AliasMove
from pipelines.registry.model_card import (
    MAX_DESCRIPTION_CHARS,
    model_card,
    version_card,
    with_history,
    with_outcome,
)
from support.mlflow_stores import MlflowStore

METADATA = {
    "model": "edge_connect",
    "size": 64,
    "steps": 300,
    "seed": 0,
    "masks": {"center": 1.0, "box": 1.0},
    "hole_range": [0.0625, 0.25],
    "takes_edges": True,
    "needs_edges": True,
    "sigma": 2.0,
    "splits": {"train": 81, "val": 9, "test": 10},
    "source": "photos",
    "protocol": {"photographs": 10, "sizes": ["64x64"], "seed": 0},
    "scored_on": {"split": "test"},
    "baselines": {"telea": {"center/psnr_rgb_hole": 19.264, "center/fd": 763.0}},
    "metric": "psnr_rgb_hole",
    "verdict": "edge_connect: 17.77 dB in the hole, 1.49 dB worse than Telea.",
    "samples": ["samples/center masks.png"],
}
METRICS = {"center/psnr_rgb_hole": 17.7712, "center/ssim_gauss11_rgb": 0.76934, "center/fd": 767.2}


def moves(count: int) -> list[AliasMove]:
    return [
        AliasMove(
            str(number),
            number,
            "champion",
            "promote",
            str(number + 1),
            str(number) if number else None,
            f"2026-11-{number % 28 + 1:02d}T12:00:00+00:00",
            "ann@host",
            "psnr_rgb_hole 18.52 against 17.10 of the version before on the same photographs",
        )
        for number in range(count)
    ]


def test_a_card_has_data_scores_limits_and_use() -> None:
    card = version_card("fronts", METADATA, METRICS, "ab12")
    lines = card.splitlines()
    assert lines[0].startswith("EdgeConnect: Generative Image Inpainting")
    for line in (
        "* photographs: 81 train, 9 val, 10 test, of `photos`",
        "* masks: center, box (holes of 6 to 25 % of the image)",
        "* edges: Canny, sigma 2",
        "| center masks&nbsp;&nbsp;&nbsp; | PSNR hole&nbsp;&nbsp;&nbsp; | SSIM&nbsp;&nbsp;&nbsp; | FD&nbsp;&nbsp;&nbsp; |",
        "| **this version** | 17.77 | 0.7693 | 767.20 |",
        "| Telea | 19.26 |  | 763.00 |",
        METADATA["verdict"],
        "![samples](get-artifact?path=samples%2Fcenter%20masks.png&run_uuid=ab12)",
        "* Methods without training are better in `psnr_rgb_hole`: Telea.",
        "* Trained on holes of 6 to 25 % of the image: expect worse results on larger holes.",
        "inpaint fill models:/fronts/VERSION photo.png mask.png --out filled.png",
    ):
        assert line in lines


def test_a_card_has_digests_intervals_and_marks() -> None:
    protocol = {**METADATA["protocol"], "photographs_sha256": "a" * 64, "masks_sha256": "b" * 64}
    extra = {
        "protocol": protocol,
        "intervals": {"center/psnr_rgb_hole": [17.2, 18.4], "center/ssim_gauss11_rgb": [0.75, 0.79]},
        "worse": {"": ["center/psnr_rgb_hole"], "telea": ["center/ssim_gauss11_rgb"]},
    }
    baselines = {"telea": {"center/psnr_rgb_hole": 19.264, "center/ssim_gauss11_rgb": 0.7}}
    card = version_card("fronts", METADATA | extra | {"baselines": baselines}, METRICS, "ab12")
    assert "| **this version** | 17.77↓ (17.20 to 18.40) | 0.7693 (0.7500 to 0.7900) | 767.20 |" in card
    assert "| Telea | 19.26 | 0.7000↓ |  |" in card
    assert f"Digests: photographs `{'a' * 12}`, masks `{'b' * 12}`." in card
    assert "In brackets: the 95 % interval" in card
    assert "In brackets" not in version_card("fronts", METADATA, METRICS, "ab12"), "of an earlier release"


def test_scores_by_band_follow_the_mean() -> None:
    bands = {f"box/{low}-{low + 10}/psnr_rgb_hole": 20 - low / 10 for low in (20, 0, 10)}
    card = version_card("x", {"model": "edge_connect"}, bands | {"box/psnr_rgb_hole": 18.0}, None)
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert table[2:] == [
        "| **this version** | 18.00 |",
        "| holes of 0-10 % | 20.00 |",
        "| holes of 10-20 % | 19.00 |",
        "| holes of 20-30 % | 18.00 |",
    ]


@pytest.mark.parametrize("metadata", [{}, {"model": "unknown_model", "sigma": None, "masks": None}])
def test_a_version_without_a_record_has_a_card(metadata: dict[str, object]) -> None:
    card = version_card("x", metadata, {}, None)
    assert "## Use" in card
    assert "None" not in card


def test_a_card_fits_into_mlflows_column() -> None:
    metrics = {
        f"folder-{index}/{band}{metric}": 1.0
        for index in range(40)
        for band in ("", *(f"{low}-{low + 10}/" for low in range(0, 60, 10)))
        for metric in ("psnr_rgb_hole", "psnr_rgb", "ssim_gauss11_rgb", "l1_percent")
    }
    card = with_outcome(version_card("x", METADATA, metrics, "ab"), False, "worse " * 300)
    assert len(card) <= MAX_DESCRIPTION_CHARS
    assert "more mask sets: `inpaint models show x/VERSION`" in card
    assert "## Use" in card
    assert with_outcome(card, True, "better").count("## Compared with the champion") == 1


def test_the_history_in_a_description_is_the_newest_moves() -> None:
    description = model_card("x", "edge_connect", "psnr_rgb_hole", moves(40))
    assert len(description) <= MAX_DESCRIPTION_CHARS
    assert "version 40 became champion instead of version 39, by ann@host: psnr" in description
    assert "* 28 earlier: `inpaint models history x`" in description
    assert with_history(description, "x", moves(40)) == description
    own = with_history("My own words.", "x", moves(1))
    assert own.startswith("My own words.\n\n## Alias history\n\n* 2026-11-01 12:00 UTC: version 1 became")


def test_models_of_earlier_releases_get_their_history_as_text(bare: MlflowStore) -> None:
    """They have no descriptions; a user may also write one."""
    bare.add_empty_versions("encoder", 2)
    client: MlflowClient = bare.client

    def description() -> str:
        return str(client.get_registered_model("encoder").description)

    registry.promote("encoder", "1", tracking_uri=bare.uri)
    assert "`candidate` is the newest version" in description()
    assert "version 1 became champion, by " in description()
    client.update_registered_model("encoder", "My own words.")
    registry.promote("encoder", "2", reason="sharper", tracking_uri=bare.uri)
    assert description().startswith("My own words.")
    assert "version 2 became champion instead of version 1, by " in description()
    assert ": sharper" in description()


def test_registering_again_keeps_the_description(quick: MlflowStore, encoder: object) -> None:
    version = quick.register(encoder, "encoder")  # type: ignore[arg-type]
    card = quick.client.get_model_version("encoder", version).description
    assert f"models:/encoder/{version}" in card
    quick.client.update_model_version("encoder", version, "My own words.")
    assert quick.register(encoder, "encoder") == version  # type: ignore[arg-type]
    assert quick.client.get_model_version("encoder", version).description == "My own words."
