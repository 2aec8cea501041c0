"""Settings as typed, stored and read back; keys of cells."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from gradlab.errors import GradlabError, StoreError, UsageError
from gradlab.study import Cell, Preset, Study, parse_settings, setting, settings_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    depth: tuple[int, ...] = setting((8, 20), "depths", least=2)
    net: tuple[str, ...] = setting(("plain",), "nets", choices=("plain", "residual"))
    marks: tuple[int, ...] = setting((), "may be empty", least=1, empty=True)
    task: str = setting("digits", "one of two", choices=("digits", "cifar10"))
    note: str = setting("", "any text")
    seeds: int = setting(3, "seeds", least=1)
    lr: float = setting(0.1, "rate", least=0)
    shift: float = setting(0.0, "any finite number")
    augment: bool = setting(False, "yes or no")
    limit: int | None = setting(None, "a number or none", least=0)

    def __post_init__(self) -> None:
        if self.note == "refuse":
            raise UsageError("Setting 'note' cannot be that.")


def nothing(*_: Any) -> Any:
    raise AssertionError("not called")


STUDY = Study(
    name="example",
    title="",
    question="",
    notes=(),
    settings=Settings,
    presets={"default": Preset(summary=""), "small": Preset(summary="", settings={"seeds": 1, "depth": (8,)})},
    plan=nothing,
    run=nothing,
    claims=nothing,
    figures={},
)


def cell(part: str = "train", **settings: Any) -> Cell:
    return Cell(part=part, label="any", settings=settings)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_hash_of_part_and_sorted_settings() -> None:
    expected = hashlib.sha256(b'["train", {"a": 1, "b": "x"}]').hexdigest()[:16]
    assert cell(b="x", a=1).key == expected


def test_a_key_is_the_same_in_another_process() -> None:
    code = "from gradlab.study import Cell; print(Cell(part='p', label='', settings={'b': [1], 'a': 0.1}).key)"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert answers == {cell("p", a=0.1, b=[1]).key}


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Cell(part="train", label="other", settings={"a": 1, "b": (1, 2)}, cost=9.0), True),
        (cell(b=[1, 2], a=1), True),
        (cell("test", a=1, b=(1, 2)), False),
        (cell(a=2, b=(1, 2)), False),
        (cell(a=1, b=(2, 1)), False),
        (cell(a=1), False),
        (cell(a=True, b=(1, 2)), False),
        (cell(a="1", b=(1, 2)), False),
    ],
    ids=["label and cost", "list or tuple", "part", "value", "order of a tuple", "one less", "bool or int", "text"],
)
def test_a_key_depends_on_the_content_alone(other: Cell, same: bool) -> None:
    assert (cell(a=1, b=(1, 2)).key == other.key) is same


# -- settings as typed ------------------------------------------------------------------------------------------------


def test_a_preset_replaces_defaults_and_an_override_the_preset() -> None:
    settings = parse_settings(STUDY, "small", ["depth=14"])
    assert (settings.seeds, settings.depth, settings.lr) == (1, (14,), 0.1)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("seeds=7", "seeds", 7),
        (" seeds = 7 ", "seeds", 7),
        ("lr=1e-3", "lr", 1e-3),
        ("lr=2", "lr", 2.0),
        ("shift=-0.5", "shift", -0.5),
        ("augment=Yes", "augment", True),
        ("augment=0", "augment", False),
        ("depth=8, 20,56", "depth", (8, 20, 56)),
        ("depth=8", "depth", (8,)),
        ("net=residual,plain", "net", ("residual", "plain")),
        ("marks=", "marks", ()),
        ("limit=none", "limit", None),
        ("limit=4", "limit", 4),
        ("note=a=b=c", "note", "a=b=c"),
        ("note=", "note", ""),
    ],
    ids=str,
)
def test_an_override_is_read_in_its_type(text: str, name: str, value: object) -> None:
    got = getattr(parse_settings(STUDY, "default", [text]), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seeds", "--set takes KEY=VALUE; got 'seeds'."),
        ("", "--set takes KEY=VALUE; got ''."),
        ("=3", "Unknown setting ''."),
        ("seed=3", "Unknown setting 'seed'. Did you mean 'seeds'?"),
        ("seeds=3.5", "Setting 'seeds' takes a whole number; got '3.5'."),
        ("seeds=", "Setting 'seeds' takes a whole number; got ''."),
        ("seeds=0", "Setting 'seeds' must be at least 1; got 0."),
        ("lr=fast", "Setting 'lr' takes a number; got 'fast'."),
        ("lr=-1", "Setting 'lr' must be at least 0; got -1.0."),
        ("lr=nan", "Setting 'lr' takes a finite number; got 'nan'."),
        ("lr=inf", "Setting 'lr' takes a finite number; got 'inf'."),
        ("shift=-inf", "Setting 'shift' takes a finite number; got '-inf'."),
        ("augment=maybe", "Setting 'augment' takes true or false; got 'maybe'."),
        ("task=digts", "Unknown task value 'digts'. Did you mean 'digits'?"),
        ("net=plain,residul", "Unknown net value 'residul'. Did you mean 'residual'?"),
        ("depth=", "Setting 'depth' needs at least one value."),
        ("depth=8,,20", "Setting 'depth' takes values with single commas between them; got '8,,20'."),
        ("depth=8,", "Setting 'depth' takes values with single commas between them; got '8,'."),
        ("depth=8,20,8", "Setting 'depth' names a value twice: 8, 20, 8."),
        ("depth=8,1", "Setting 'depth' must be at least 2; got 1."),
        ("depth=8;20", "Setting 'depth' takes a whole number; got '8;20'."),
        ("limit=-1", "Setting 'limit' must be at least 0; got -1."),
        ("limit=few", "Setting 'limit' takes a whole number; got 'few'."),
        ("note=refuse", "Setting 'note' cannot be that."),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_a_wrong_override_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(STUDY, "default", [text])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_setting_given_twice_is_refused_not_guessed() -> None:
    with pytest.raises(UsageError, match=r"Setting 'seeds' is given twice, the second time as '2': give it once."):
        parse_settings(STUDY, "default", ["seeds=3", "seeds=2"])


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown preset 'smal'. Did you mean 'small'\?"):
        parse_settings(STUDY, "smal")


# -- settings as stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [[], ["depth=8,20", "marks=1,2", "lr=0.1", "augment=yes", "limit=3", "note=ü"], ["lr=1", "marks="]],
    ids=["defaults", "changed", "number without a point"],
)
def test_settings_come_back_from_json_unchanged(overrides: list[str]) -> None:
    settings = parse_settings(STUDY, "default", overrides)
    stored = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert settings_from(STUDY, stored) == settings


@pytest.mark.parametrize(
    ("stored", "kind", "sentence"),
    [
        ({"sedes": 1}, UsageError, "Unknown setting 'sedes'. Did you mean 'seeds'? The run was made by another"),
        ({"seeds": "many"}, StoreError, "The run's manifest is damaged: setting 'seeds' cannot be 'many'."),
        ({"seeds": 2.5}, StoreError, "The run's manifest is damaged"),
        ({"seeds": True}, StoreError, "The run's manifest is damaged"),
        ({"seeds": None}, StoreError, "The run's manifest is damaged"),
        ({"lr": [1]}, StoreError, "The run's manifest is damaged"),
        ({"depth": 8}, StoreError, "The run's manifest is damaged"),
        ({"depth": [8, "x"]}, StoreError, "The run's manifest is damaged"),
        ({"depth": [[8]]}, StoreError, "The run's manifest is damaged"),
        ({"limit": "x"}, StoreError, "The run's manifest is damaged"),
        ({"augment": 1}, StoreError, "The run's manifest is damaged"),
        ({"seeds": 0}, UsageError, "Setting 'seeds' must be at least 1; got 0."),
        ({"task": "mnist"}, UsageError, "Unknown task value 'mnist'."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_damaged_settings_are_one_sentence(stored: dict[str, Any], kind: type[GradlabError], sentence: str) -> None:
    with pytest.raises(kind) as caught:
        settings_from(STUDY, stored)
    assert str(caught.value).startswith(sentence)


def test_a_number_without_a_point_is_a_number() -> None:
    assert settings_from(STUDY, {"lr": 1, "limit": None}).lr == 1
