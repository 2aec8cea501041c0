"""`gradlab diagnose` on a user's file and on a saved trace, and on files that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gradlab.analysis.finding import Diagnosis
from gradlab.trace import Trace

Cli = Callable[..., Result]

USER_FILE = """
import torch
from torch import nn

def net(activation, depth=10):
    layers = [part for _ in range(depth) for part in (nn.Linear(8, 8), activation())]
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model

def batches(count=4):
    for _ in range(count):
        yield torch.randn(32, 8), torch.randint(0, 3, (32,))

def sick():
    model = net(nn.Sigmoid)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches(), nn.functional.cross_entropy

def healthy():
    return {"model": net(nn.ReLU, 3), "optimizer": None, "data": next(batches()), "loss": nn.CrossEntropyLoss()}

def raises():
    raise ValueError("my own mistake\\nand more of it")

def three():
    return 1, 2, 3

def mismatch():
    return nn.Linear(3, 3), None, [(torch.randn(2, 4), torch.zeros(2, 3))], nn.functional.mse_loss

def no_parameters():
    return nn.ReLU(), None, list(batches()), nn.functional.cross_entropy

def no_data():
    return net(nn.ReLU), None, [], nn.functional.cross_entropy

def number():
    return net(nn.ReLU), None, 7, nn.functional.cross_entropy

def no_loss():
    return net(nn.ReLU), None, batches(), "cross_entropy"

def no_optimizer():
    return net(nn.ReLU), "SGD", batches(), nn.functional.cross_entropy
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def test_a_sick_net_is_diagnosed_and_saved(cli: Cli, file: Path) -> None:
    result = cli("diagnose", f"{file}:sick", "--steps", "4", "--save", "sick.trace")
    assert result.exit_code == 0
    assert "1. vanishing through depth" in result.stdout
    assert "sigmoid" in result.stdout
    trace = Trace.load("sick.trace")
    assert trace.steps["step"].tolist() == [0, 1, 2, 3]
    assert trace.steps["loss"].notna().all()
    again = cli("diagnose", "sick.trace", "--json", "--strict")
    assert again.exit_code == 3
    assert Diagnosis.from_json(again.stdout).kinds == ("vanishing",)


def test_a_healthy_net_is_told_so(cli: Cli, file: Path) -> None:
    result = cli("diagnose", f"{file}:healthy", "--strict", "--steps", "3")
    assert (result.exit_code, result.stdout.strip()) == (0, "Healthy by the rules 'gradlab'.")


def test_what_if_shows_before_and_after_and_gives_advice(cli: Cli, file: Path) -> None:
    result = cli("diagnose", f"{file}:sick", "--whatif", "--steps", "4")
    assert result.exit_code == 0
    for word in ("as it is", "batchnorm", "activation", "Not tried: chrono", "Try "):
        assert word in result.stdout
    data = json.loads(cli("diagnose", f"{file}:sick", "--whatif", "--steps", "4", "--json").stdout)
    assert data["whatif"]["best"] in ("batchnorm", "activation")
    assert data["whatif"]["trials"][0]["name"] == "as it is"


def test_the_seed_decides_the_numbers(cli: Cli, file: Path) -> None:
    first, same, other = (
        cli("diagnose", f"{file}:sick", "--steps", "3", "--json", "--seed", seed).stdout for seed in ("1", "1", "2")
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("sikc", "has no function 'sikc'. Did you mean 'sick'?"),
        ("raises", "fails with ValueError: my own mistake ("),
        ("three", "must return (model, optimizer, data, loss)"),
        ("mismatch", "training fails with RuntimeError: mat1 and mat2 shapes"),
        ("no_parameters", "has no parameters"),
        ("no_data", "hold no batch"),
        ("number", "data must be (inputs, targets) or an iterable"),
        ("no_loss", "the loss must be a function"),
        ("no_optimizer", "must be a torch.optim.Optimizer or None; got str"),
    ],
)
def test_a_wrong_setup_is_one_sentence(cli: Cli, file: Path, function: str, words: str) -> None:
    result = cli("diagnose", f"{file}:{function}")
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.py:make",), "There is no file nowhere.py"),
        (("nowhere",), "neither a saved trace nor FILE.py:FUNCTION"),
        (("{file}:raises", "--rules", "gradlap"), "Unknown rules 'gradlap'. Did you mean 'gradlab'?"),  # not called
        (("{file}:sick", "--save", "{file}"), "exists already"),
        ((".", "--whatif"), "need a model"),
        ((".",), "is missing"),
    ],
    ids=["file", "name", "rules", "save", "trace and whatif", "no trace"],
)
def test_wrong_words_are_one_sentence(cli: Cli, file: Path, arguments: tuple[str, ...], words: str) -> None:
    result = cli("diagnose", *(word.format(file=file) for word in arguments))
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_python_is_one_sentence(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(:\n")
    result = cli("diagnose", "broken.py:make")
    assert result.exit_code == 2
    assert "cannot be imported: SyntaxError" in result.stderr
