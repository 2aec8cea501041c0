"""An adapter whose package is not installed says so in one sentence, and which extra brings it."""

import importlib
import sys

import pytest

from gradlab.errors import UsageError


@pytest.mark.parametrize(
    ("adapter", "package", "blocked"),
    [
        ("lightning", "lightning", "lightning.pytorch"),
        ("huggingface", "transformers", "transformers"),
        ("huggingface", "accelerate", "accelerate"),
        ("tensorboard", "tensorboard", "torch.utils.tensorboard.writer"),
        ("wandb", "wandb", "wandb"),
        ("mlflow", "mlflow", "mlflow"),
    ],
    ids=lambda value: value if "." not in value else "",
)
def test_a_missing_extra_is_named(adapter, package, blocked, monkeypatch):
    monkeypatch.setitem(sys.modules, blocked, None)  # what importing it then raises: ModuleNotFoundError
    monkeypatch.delitem(sys.modules, f"gradlab.integrations.{adapter}", raising=False)
    with pytest.raises(UsageError) as refused:
        importlib.import_module(f"gradlab.integrations.{adapter}")
    need = f"gradlab.integrations.{adapter} needs the package {package}, which is not installed"
    assert str(refused.value) == f"{need}: pip install 'gradlab[{adapter}]'."


def test_gradlab_itself_imports_no_integration():
    import subprocess

    code = "import sys, gradlab as gl; gl.watch; gl.load; print([m for m in sys.modules if 'integrations' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
