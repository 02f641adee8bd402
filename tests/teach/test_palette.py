"""The colours stay apart for colour-blind readers, and are dark enough on white."""

import itertools

import numpy as np
import pytest

from qlab.teach.palette import ROLES, colour

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear_rgb(hex_colour):
    c = np.array([int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_roles_stay_apart(vision):
    seen = {role: lab(np.array(VISION[vision]) @ linear_rgb(c)) for role, c in ROLES.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, f"{a} and {b} look alike under {vision}"


@pytest.mark.parametrize("role", ROLES)
def test_contrast_on_white(role):
    luminance = np.dot([0.2126, 0.7152, 0.0722], linear_rgb(ROLES[role]))
    assert 1.05 / (luminance + 0.05) >= 3


def test_unknown_role_lists_the_roles():
    with pytest.raises(ValueError, match="original, quantized, error, adapter, neutral"):
        colour("red")
