"""Colour profiles assembled from their numbers (ICC.1:2022), and in float64 the sRGB that their colours are."""

import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])  # of the profiles' connection space
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PRIMARIES = {  # x, y of red, green and blue; white is D65 in all
    "sRGB": [(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)],
    "Display P3": [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)],
    "P3 with a gamma of 2.2": [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)],
    "Adobe RGB": [(0.640, 0.330), (0.210, 0.710), (0.150, 0.060)],
}


def srgb_curve(power=2.4):
    numbers = (power, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return struct.pack(">4s4xHH5i", b"para", 3, 0, *(round(65536 * number) for number in numbers))


SRGB_CURVE = srgb_curve()
ADOBE_GAMMA = 563 / 256


def gamma_curve(gamma):
    return struct.pack(">4s4xIH2x", b"curv", 1, round(256 * gamma))


CURVES = {"sRGB": SRGB_CURVE, "Display P3": SRGB_CURVE, "Adobe RGB": gamma_curve(ADOBE_GAMMA)}
CURVES["P3 with a gamma of 2.2"] = gamma_curve(2.2)


def xyz(x, y):
    return np.array([x / y, 1.0, (1 - x - y) / y])


def to_xyz(name):
    """The matrix from linear RGB to XYZ under D65."""
    columns = np.stack([xyz(*xy) for xy in PRIMARIES[name]], axis=1)
    return columns * np.linalg.solve(columns, xyz(0.3127, 0.3290))


def profile(space, device, tags, connection=b"XYZ "):
    """An ICC file with these tags, {name: data}, for colours of this space."""
    at, directory, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        directory += struct.pack(">4sII", name, at + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3i48x", at + len(data), 0x04000000, device, space, connection, b"acsp", *fixed(D50)
    )
    return header + struct.pack(">I", len(tags)) + directory + data


def fixed(numbers):
    return [round(65536 * n) for n in numbers]


def rgb_profile(name):
    """A display's profile by its primaries and its curve."""
    cone = BRADFORD @ xyz(0.3127, 0.3290)
    adapt = np.linalg.solve(BRADFORD, np.diag(BRADFORD @ D50 / cone) @ BRADFORD)
    columns = (adapt @ to_xyz(name)).T
    tags = {b"wtpt": struct.pack(">4s4x3i", b"XYZ ", *fixed(D50))}
    tags |= {
        key: struct.pack(">4s4x3i", b"XYZ ", *fixed(c))
        for key, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    return profile(b"RGB ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), CURVES[name]))


def grey_profile(gamma):
    white = struct.pack(">4s4x3i", b"XYZ ", *fixed(D50))
    return profile(b"GRAY", b"mntr", {b"wtpt": white, b"kTRC": gamma_curve(gamma)})


def cmyk_profile(paper, ink):
    """A scanner's, of which each ink alone is as dark as all four: L* from `paper` without ink to `ink` with any."""
    lightness = [paper] + [ink] * 15
    table = bytes(value for L in lightness for value in (round(L * 2.55), 128, 128))
    ramp = bytes(range(256))
    head = struct.pack(">4s4x4B9i", b"mft1", 4, 3, 2, 0, *fixed(np.eye(3).ravel()))
    return profile(b"CMYK", b"scnr", dict.fromkeys((b"A2B0", b"A2B1"), head + 4 * ramp + table + 3 * ramp), b"Lab ")


def srgb_encoded(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(picture, name):
    """(H, W, 3) of a profile's 0..255 -> sRGB's, clipped and not rounded."""
    values = picture / 255.0
    srgb = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = {"Adobe RGB": values**ADOBE_GAMMA, "P3 with a gamma of 2.2": values**2.2}.get(name, srgb)
    return srgb_encoded(linear @ np.linalg.solve(to_xyz("sRGB"), to_xyz(name)).T)
