from __future__ import annotations

import subprocess
import sys

import pytest

from gradlab import nets


def test_names_cost_no_import_of_torch() -> None:
    code = (
        "import sys, gradlab.nets as nets\n"
        "nets.NORMS, nets.INITIALIZATIONS, nets.ACTIVATIONS, nets.PADDING_MODES, dir(nets)\n"
        "assert 'torch' not in sys.modules\n"
        "nets.CifarNet\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", nets.__all__, ids=nets.__all__)
def test_every_public_name_resolves_to_its_own_object(name: str) -> None:
    value = getattr(nets, name)
    assert name in dir(nets)
    assert isinstance(value, tuple | dict) or (value.__name__ == name and value.__module__.startswith("gradlab.nets."))


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ResNet'"):
        nets.ResNet  # noqa: B018
