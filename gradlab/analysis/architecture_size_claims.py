"""The claims about the five families that are counted: parameters, receptive fields, savings, channels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradlab.analysis.claims import Claim, decide_exact

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

__all__ = ["size_claims"]

_ABSENT = "No finished cell measured this."
_VGG = "Simonyan & Zisserman 2014, sec. 2.3"
_INCEPTION = "Szegedy et al. 2014, table 1"
#: Exact parameters. AlexNet with two towers has convolutions in two groups; GoogLeNet has 5x5 kernels and biases.
_COUNTS: dict[str, tuple[str, dict[str, int]]] = {
    "AlexNet": (
        "Krizhevsky et al. 2012, sec. 3.5: 60 million; exact counts derived",
        {"AlexNet": 60_965_224, "AlexNet one tower": 62_378_344},
    ),
    "VGG": (
        "Simonyan & Zisserman 2014, table 2: 133, 133, 138, 144 million; exact counts derived",
        {"VGG-11": 132_863_336, "VGG-13": 133_047_848, "VGG-16": 138_357_544, "VGG-19": 143_667_240},
    ),
    "GoogLeNet": (
        "Szegedy et al. 2014, table 1; exact counts derived",
        {"GoogLeNet": 6_998_552, "GoogLeNet with heads": 13_378_280},
    ),
    "ResNet": (
        "He et al. 2015, table 1; exact counts derived",
        {
            "ResNet-18": 11_689_512,
            "ResNet-34": 21_797_672,
            "ResNet-50": 25_557_032,
            "ResNet-101": 44_549_160,
            "ResNet-152": 60_192_808,
        },
    ),
    "DenseNet": (
        "Huang et al. 2016, table 1; exact counts derived",
        {"DenseNet-121": 7_978_856, "DenseNet-169": 14_149_480, "DenseNet-201": 20_013_928},
    ),
}
#: What the study notes say: id, net that comes nearest, number, words. "About" is taken as within 10 %.
_NOTED = (
    ("N1 size", "AlexNet", 60e6, "AlexNet has about 60M parameters."),
    ("N2 size", "VGG-11", 110e6, "VGGNet has about 110M parameters (VGG-11, the smallest, comes nearest)."),
    ("N3 size", "GoogLeNet", 4e6, "GoogLeNet has about 4M parameters."),
)
_FIELDS = {
    ("VGG-16", "conv5_3"): 196,
    ("VGG-16", "pool5"): 212,
    ("AlexNet", "conv5"): 163,
    ("AlexNet", "pool5"): 195,
    ("CIFAR-ResNet-20", "stage2_2"): 81,
    ("CIFAR-ResNet-56", "stage2_8"): 249,
    ("CIFAR-ResNet-110", "stage2_17"): 501,
}
#: Block -> id, parameters with and without, words, source.
_SAVINGS = {
    "two 3x3": ("N2 two", 18, 25, "Two 3x3 convolutions have 72 % of the weights of one 5x5", _VGG),
    "three 3x3": ("N2 three", 27, 49, "Three 3x3 have 55.1 % of the weights of one 7x7", _VGG),
    "inception 3a": (
        "N3 3a", 163_696, 393_472, "1x1 reductions shrink inception 3a from 393,472 to 163,696", _INCEPTION,
    ),
    "inception 4a": (
        "N3 4a", 376_176, 1_597_952, "and 4a from 1,597,952 to 376,176 parameters", _INCEPTION,
    ),
    "5x5 branch of 3a": (
        "N3 branch", 15_872, 153_600, "and the weights of 3a's 5x5 branch from 153,600 to 15,872", _INCEPTION,
    ),
    "bottleneck 256": (
        "C4 bottleneck", 69_632, 1_179_648, "A bottleneck 256-64-64-256 has 69,632 weights, two 3x3 have 1,179,648",
        "He 2015, fig. 5",
    ),
}  # fmt: skip
#: Channels of DenseNet-121 after the stem and at each dense block's and transition's end.
_CHANNELS = {
    "pool": 64,
    "dense1_6": 256,
    "transition1": 128,
    "dense2_12": 512,
    "transition2": 256,
    "dense3_24": 1024,
    "transition3": 512,
    "dense4_16": 1024,
}


def size_claims(nets: pd.DataFrame, fields: pd.DataFrame, savings: pd.DataFrame, channels: pd.DataFrame) -> list[Claim]:
    """Decide what can be counted: parameters, receptive fields, savings, DenseNet's channels.

    Args:
        nets: Columns net, parameters, linear_parameters.
        fields: Columns net, place, measured (through the gradient), arithmetic.
        savings: Columns block, parameters, plain.
        channels: Columns piece, channels.
    """
    found = {} if nets.empty else dict(zip(nets["net"], nets["parameters"].astype(int), strict=True))
    claims = [_counts(family, found) for family in _COUNTS]
    claims += [_noted(*row, nets) for row in _NOTED]
    claims += _fields(fields)
    claims += [_saving(block, savings) for block in _SAVINGS]
    claims.append(_channels(channels))
    return claims


def _counts(family: str, found: Mapping[str, int]) -> Claim:
    source, expected = _COUNTS[family]
    own = {net: found[net] for net in expected if net in found}
    listed = ", ".join(f"{net} {count:,}" for net, count in own.items())
    return decide_exact(
        float(sum(own.get(net) == count for net, count in expected.items())) if own else math.nan,
        float(len(expected)),
        id=f"C4 {family}",
        statement=f"Nets of the family {family} with exactly the derived numbers of parameters.",
        source=source,
        unit="nets",
        detail=f"{listed}." if own else _ABSENT,
    )


def _noted(key: str, net: str, number: float, statement: str, nets: pd.DataFrame) -> Claim:
    row = nets[nets["net"] == net] if len(nets) else nets
    detail, count = _ABSENT, math.nan
    if len(row):
        count, linear = float(row["parameters"].iloc[0]), float(row["linear_parameters"].iloc[0])
        detail = f"{net} has {count:,.0f}, {100 * linear / count:.1f} % of them in linear layers."
        if net == "GoogLeNet":
            detail += f" Without the last linear layer {count - linear:,.0f}."
    return decide_exact(
        count, number, rel_tol=0.1, id=key, statement=statement, source="study notes", unit="parameters", detail=detail
    )


def _fields(fields: pd.DataFrame) -> list[Claim]:
    keys = [] if fields.empty else list(zip(fields["net"], fields["place"], strict=True))
    measured = dict(zip(keys, fields["measured"].astype(int), strict=True)) if keys else {}
    own = {key: measured[key] for key in _FIELDS if key in measured}
    listed = ", ".join(f"{net} {place} {field}" for (net, place), field in own.items())
    claims = [
        decide_exact(
            float(sum(own.get(key) == field for key, field in _FIELDS.items())) if own else math.nan,
            float(len(_FIELDS)),
            id="C4 fields",
            statement="Receptive fields, measured through the gradient, are 196 and 212 (VGG-16), 163 and 195 "
            "(AlexNet), 81, 249 and 501 (CIFAR ResNet-20, 56, 110).",
            source="derived by arithmetic",
            unit="places",
            detail=f"{listed}." if own else _ABSENT,
        ),
        decide_exact(
            float((fields["measured"] == fields["arithmetic"]).mean()) if keys else math.nan,
            1.0,
            id="C4 arithmetic",
            statement="The arithmetic of kernels and strides gives every receptive field that is measured.",
            source="derived by arithmetic",
            unit="share of places",
            detail=f"{len(keys)} places." if keys else _ABSENT,
        ),
    ]
    for count, expected in ((2, 5), (3, 7)):
        claims.append(
            decide_exact(
                float(measured.get(("3x3", f"{count} of 3x3"), math.nan)),
                float(expected),
                id=f"N2 field {expected}",
                statement=f"{'Two' if count == 2 else 'Three'} stacked 3x3 convolutions see {expected}x{expected} "
                "pixels.",
                source="Simonyan & Zisserman 2014, sec. 2.3",
                unit="pixels",
                detail="" if keys else _ABSENT,
            )
        )
    return claims


def _saving(block: str, savings: pd.DataFrame) -> Claim:
    key, kept, plain, words, source = _SAVINGS[block]
    row = savings[savings["block"] == block] if len(savings) else savings
    ratio, detail = math.nan, _ABSENT
    if len(row):
        counted, without = int(row["parameters"].iloc[0]), int(row["plain"].iloc[0])
        ratio = counted / without
        detail = f"Counted {counted:,} against {without:,}, a factor of {without / counted:.2f}."
    return decide_exact(
        ratio, kept / plain, id=key, statement=f"{words}.", source=source, unit="with / without", detail=detail
    )


def _channels(channels: pd.DataFrame) -> Claim:
    found = {} if channels.empty else dict(zip(channels["piece"], channels["channels"].astype(int), strict=True))
    listed = ", ".join(f"{piece} {found[piece]}" for piece in _CHANNELS if piece in found)
    return decide_exact(
        float(sum(found.get(piece) == count for piece, count in _CHANNELS.items())) if found else math.nan,
        float(len(_CHANNELS)),
        id="N6 channels",
        statement="Dense blocks grow channels by 32 a layer and transitions halve them (DenseNet-121).",
        source="Huang et al. 2016, table 1",
        unit="places",
        detail=f"{listed}." if found else _ABSENT,
    )
