"""The room's door: every name opens, and torch stays outside."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from gradlab import analysis


@pytest.mark.parametrize("name", analysis.__all__, ids=str)
def test_every_public_name_is_the_one_its_module_holds(name):
    home = importlib.import_module(f"gradlab.analysis.{analysis._HOME[name]}")
    assert getattr(analysis, name) is getattr(home, name)
    assert name in dir(analysis)


def test_names_are_listed_once_and_all_have_a_home():
    assert sorted(analysis._HOME) == sorted(analysis.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'gradient_gian'"):
        _ = analysis.gradient_gian


@pytest.mark.parametrize(
    ("use", "absent"),
    [
        ("import gradlab.analysis", ("torch", "scipy", "pandas", "matplotlib")),
        ("from gradlab.analysis import *", ("torch", "pandas", "matplotlib", "scipy.stats")),
    ],
    ids=["import alone", "every name"],
)
def test_imports_stay_light(use, absent):
    code = f"import sys\n{use}\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
