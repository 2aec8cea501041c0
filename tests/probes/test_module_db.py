"""PyTorch's own module database, every sample: a watched module computes what a bare one does, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("module_samples.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_outputs_gradients_buffers_and_random_state_of_every_sample_are_unchanged(found):
    assert found["wrong"] == []


@pytest.mark.slow
def test_no_sample_is_left_out(found):
    assert found["refused"] == []
    assert found["float32"] >= 1800
    assert found["float64"] >= 11
