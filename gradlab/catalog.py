"""Which studies there are: the ones gradlab ships, and those other packages register."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from gradlab.errors import UsageError, unknown
from gradlab.study import Study

__all__ = ["find_study", "studies"]

_PACKAGE = "gradlab.experiments"


def studies() -> dict[str, Study]:
    """Return all studies by name: each module of `gradlab.experiments` has one as STUDY, each entry point is one.

    Raises:
        UsageError: An entry point of the group "gradlab.experiments" cannot be loaded, is no study, or has a name that
            is taken.
    """
    return dict(sorted((_shipped() | _registered()).items()))


def find_study(name: str) -> Study:
    """Return a study by name.

    Raises:
        UsageError: There is none of that name; names the nearest.
    """
    # What gradlab ships is found even where another package's experiment is broken.
    known = _shipped() if name in _shipped() else studies()
    if name not in known:
        raise unknown("experiment", name, known, "'gradlab list' shows all.")
    return known[name]


@cache
def _shipped() -> dict[str, Study]:
    package = importlib.import_module(_PACKAGE)
    modules = (importlib.import_module(f"{_PACKAGE}.{item.name}") for item in pkgutil.iter_modules(package.__path__))
    found = (getattr(module, "STUDY", None) for module in modules)
    return {study.name: study for study in found if isinstance(study, Study)}


@cache
def _registered() -> dict[str, Study]:
    found: dict[str, Study] = {}
    for point in entry_points(group=_PACKAGE):
        try:
            study = point.load()
        except Exception as error:
            reason = str(error).rstrip(".")
            raise UsageError(f"The experiment '{point.name}' ({point.value}) cannot be loaded: {reason}.") from error
        if not isinstance(study, Study):
            raise UsageError(f"The experiment '{point.name}' ({point.value}) is no gradlab Study.")
        if study.name in found or study.name in _shipped():
            raise UsageError(f"The experiment '{study.name}' of {point.value} has a name that is taken: rename it.")
        found[study.name] = study
    return found
