"""Where the weights of the networks of published scores are. Cheap to import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedWeights:
    """The file with a network's published weights."""

    title: str
    url: str
    sha256: str


PUBLISHED_WEIGHTS = {
    "alexnet": PublishedWeights(
        "AlexNet",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "vgg16": PublishedWeights(
        "VGG-16",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "inception": PublishedWeights(
        "Inception",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}
"""Network of `evaluate.features` -> its file."""


def is_published(network: str, sha256: str) -> bool:
    """Whether these are the published weights, without which scores do not compare with those of papers."""
    return PUBLISHED_WEIGHTS[network].sha256 == sha256
