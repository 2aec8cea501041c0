"""Which studies there are, and what other packages can and cannot do to them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from gradlab import catalog
from gradlab.catalog import find_study, studies
from gradlab.errors import UsageError
from gradlab.study import Preset, Study


def nothing(*_: Any) -> Any:
    raise AssertionError("not called")


def make(name: str) -> Study:
    presets = {"smoke": Preset(summary=""), "default": Preset(summary="")}
    return Study(
        name=name, title="", question="", notes=(), settings=object, presets=presets,
        plan=nothing, run=nothing, claims=nothing, figures={},
    )  # fmt: skip


OTHER, TAKEN, AGAIN, NO_STUDY = make("another"), make("depth-sweep"), make("another"), "text"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def points(*names: str) -> None:
        found = [EntryPoint(name.lower(), f"{__name__}:{name}", "gradlab.experiments") for name in names]
        monkeypatch.setattr(catalog, "entry_points", lambda group: found if group == "gradlab.experiments" else [])
        # pytest imports this file under a name that import does not know
        monkeypatch.setattr(EntryPoint, "load", lambda point: globals()[point.attr])

    catalog._registered.cache_clear()
    yield points
    catalog._registered.cache_clear()


def test_the_shipped_studies_are_found_by_name() -> None:
    assert find_study("depth-sweep").name == "depth-sweep"
    assert list(studies()) == sorted(studies())


def test_every_shipped_study_is_complete() -> None:
    for study in catalog._shipped().values():
        assert {"smoke", "default"} <= set(study.presets)
        assert study.title
        assert study.question.endswith((".", "?"))
        assert study.notes
        assert study.run.__module__.startswith("gradlab.experiments.")  # importable in a worker


def test_a_study_of_another_package_is_listed(register: Any) -> None:
    register("OTHER")
    assert find_study("another") is OTHER
    assert list(studies()) == sorted([*catalog._shipped(), "another"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("MISSING", "The experiment 'missing' (.*MISSING) cannot be loaded: 'MISSING'."),
        ("NO_STUDY", "The experiment 'no_study' (.*NO_STUDY) is no gradlab Study."),
        ("TAKEN", "The experiment 'depth-sweep' of .*TAKEN has a name that is taken: rename it."),
    ],
    ids=["cannot be loaded", "no study", "taken"],
)
def test_a_broken_registration_is_named_and_hurts_no_shipped_study(register: Any, name: str, sentence: str) -> None:
    register(name)
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        studies()
    assert find_study("depth-sweep").run is not nothing


def test_two_packages_cannot_share_a_name(register: Any) -> None:
    register("OTHER", "AGAIN")
    with pytest.raises(UsageError, match="has a name that is taken"):
        studies()


@pytest.mark.parametrize("name", ["depth-sweeep", "depthsweep", "Depth-Sweep"])
def test_a_misspelt_study_names_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match=rf"Unknown experiment '{name}'. Did you mean 'depth-sweep'\? 'gradlab list'"):
        find_study(name)
