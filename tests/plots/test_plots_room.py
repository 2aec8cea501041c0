from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import matplotlib as mpl
import pytest

from gradlab import plots
from gradlab.plots.style import PALETTE, paper_style, shades

BLOCKED = """
import importlib.abc, sys

class NoTorch(importlib.abc.MetaPathFinder):  # as if it were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
from gradlab import plots
for name in plots.__all__:
    assert callable(getattr(plots, name)), name
import gradlab.plots.depth_figures
"""


def test_every_name_resolves_without_torch() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", BLOCKED], check=True)


def test_importing_the_package_loads_no_pandas_or_matplotlib() -> None:
    code = "import sys, gradlab.plots; assert not {'pandas', 'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_hides_a_function_of_its_name() -> None:
    modules = {item.name for item in pkgutil.iter_modules(plots.__path__)}
    assert not modules & set(plots.__all__)
    for module in modules:
        importlib.import_module(f"gradlab.plots.{module}")
    assert all(callable(getattr(plots, name)) for name in plots.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gradient_flo'"):
        plots.gradient_flo  # noqa: B018


def test_paper_style_embeds_fonts_and_ends_with_the_block() -> None:
    before = mpl.rcParams["font.size"], mpl.rcParams["pdf.fonttype"]
    with paper_style():
        assert mpl.rcParams["pdf.fonttype"] == mpl.rcParams["ps.fonttype"] == 42
        assert mpl.rcParams["figure.constrained_layout.use"]
        assert mpl.rcParams["xtick.labelsize"] >= 7
    assert (mpl.rcParams["font.size"], mpl.rcParams["pdf.fonttype"]) == before


def test_paper_style_does_not_depend_on_what_was_set_before() -> None:
    backend = mpl.get_backend()
    with mpl.rc_context({"axes.facecolor": "black", "lines.linestyle": ":"}), paper_style():
        assert mpl.rcParams["axes.facecolor"] == "white"
        assert mpl.rcParams["lines.linestyle"] == "-"
        assert mpl.get_backend() == backend


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_shades_end_in_the_kinds_own_colour_and_lighten(kind: str) -> None:
    colors = shades(kind, [110, 20, 56])
    light = [sum(mpl.colors.to_rgb(colors[depth])) for depth in (20, 56, 110)]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == 3
    assert colors[110] == PALETTE[kind].lower()
    assert shades(kind, [8]) == {8: PALETTE[kind].lower()}


def test_plain_and_residual_differ_in_lightness_for_the_common_colour_blindnesses() -> None:
    # Red-green blindness leaves the blue channel: that must tell the two apart.
    plain, residual = (mpl.colors.to_rgb(PALETTE[kind]) for kind in ("plain", "residual"))
    assert residual[2] - plain[2] > 0.5
