"""What a claim and its verdict are, and how they are written to and read from JSON text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from enum import StrEnum

from gradlab.errors import StoreError, UsageError, unknown

__all__ = ["Claim", "Verdict", "claims_from_json", "claims_to_json"]

_SCHEMA = 1
_STRINGS = ("id", "statement", "source", "rule", "expected", "unit", "detail")
_NUMBERS = ("measured", "low", "high", "p_value")
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}  # JSON has no infinity, and a diverged run has


class Verdict(StrEnum):
    """The three outcomes of a claim; the third is never rounded into the first.

    Example:
        >>> Verdict("not decided") is Verdict.NOT_DECIDED
        True
    """

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_DECIDED = "not decided"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One published or derived statement, what was measured, and the verdict of a rule fixed beforehand.

    Args:
        id: Short name, such as "C2.2a".
        statement: What is claimed, one sentence.
        source: Where it is claimed (author, year, section).
        rule: The decision rule, one sentence that starts with its kind: (E) exact, (T) theory value, (S) statistical,
            (R) rank or threshold.
        expected: What the claim leads one to expect.
        measured: The measured number; NaN where there is none.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end of its interval; NaN where there is none.
        unit: Unit of the three numbers; "" for a pure number.
        p_value: p-value of the test in the rule; NaN where there is none.
        n: Number of independent samples (seeds).
        verdict: The outcome.
        detail: Anything a reader must know to trust or doubt the verdict; "" for nothing.

    Raises:
        UsageError: `id` is empty, `n` is negative or the verdict is none of the three.

    Example:
        >>> text = dict(statement="All is 1.", source="counted", rule="(E) Equal.", expected="1", unit="", detail="")
        >>> none = dict(measured=math.nan, low=math.nan, high=math.nan, p_value=math.nan, n=0)
        >>> Claim(id="C0", verdict=Verdict.NOT_DECIDED, **text, **none).to_dict()["measured"] is None
        True
    """

    id: str
    statement: str
    source: str
    rule: str
    expected: str
    measured: float
    low: float
    high: float
    unit: str
    p_value: float
    n: int
    verdict: Verdict
    detail: str

    def __post_init__(self) -> None:
        if not self.id:
            raise UsageError("The id of a claim is '', but reports need one; give a short name such as 'C2.2a'.")
        if self.n < 0:
            raise UsageError(f"n of claim '{self.id}' is {self.n}, but it counts samples; give 0 or more.")
        if self.verdict not in tuple(Verdict):
            raise unknown("verdict", self.verdict, tuple(Verdict))
        object.__setattr__(self, "verdict", Verdict(self.verdict))

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON can hold them: NaN as None, infinities as "inf" and "-inf"."""
        row: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)}
        row |= {name: _to_json(float(getattr(self, name))) for name in _NUMBERS}
        return row | {"n": int(self.n), "verdict": str(self.verdict)}

    @classmethod
    def from_dict(cls, row: object) -> Claim:
        """Return the claim that `to_dict` wrote.

        Raises:
            StoreError: A field is missing, unknown or of the wrong type.
        """
        if not isinstance(row, dict):
            raise StoreError(f"A claim is {row!r:.60}, but it must be an object of named fields; write it anew.")
        names = [field.name for field in fields(cls)]
        missing, extra = [name for name in names if name not in row], [str(name) for name in row if name not in names]
        where = f"Claim {row.get('id')!r:.60}"
        if missing or extra:
            raise StoreError(
                f"{where} lacks the fields {missing} and has the unknown ones {extra}, but it must have exactly "
                f"{', '.join(names)}; write it anew with this version."
            )
        for name in _STRINGS:
            if not isinstance(row[name], str):
                raise StoreError(f"{where} has {name} {row[name]!r:.60}, but it must be a string; write it anew.")
        if isinstance(row["n"], bool) or not isinstance(row["n"], int):
            raise StoreError(f"{where} has n {row['n']!r:.60}, but it must be a whole number; write it anew.")
        if row["verdict"] not in list(Verdict):
            allowed = ", ".join(Verdict)
            raise StoreError(
                f"{where} has verdict {row['verdict']!r:.60}, but it must be one of {allowed}; write it anew."
            )
        try:
            return cls(**(row | {name: _from_json(name, row[name], where) for name in _NUMBERS}))
        except UsageError as error:
            raise StoreError(str(error)) from error


def _to_json(number: float) -> float | str | None:
    if math.isnan(number):
        return None
    return number if math.isfinite(number) else str(number)


def _from_json(name: str, value: object, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str) and value in _INFINITIES:
        return _INFINITIES[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StoreError(
            f"{where} has {name} {value!r:.60}, but it must be a number, null, 'inf' or '-inf'; write it anew."
        )
    return float(value)


def claims_to_json(claims: list[Claim] | tuple[Claim, ...]) -> str:
    """Return the content of a claims file: strict JSON with a schema version, the claims in the given order.

    Example:
        >>> print(claims_to_json([]), end="")
        {
          "schema": 1,
          "claims": []
        }
    """
    document = {"schema": _SCHEMA, "claims": [claim.to_dict() for claim in claims]}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def claims_from_json(text: str) -> tuple[Claim, ...]:
    """Return the claims in the content of a claims file.

    Raises:
        StoreError: The text is not JSON, is of another schema version, or a claim in it is malformed.

    Example:
        >>> claims_from_json(claims_to_json([]))
        ()
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StoreError(
            f"The claims are not JSON ({error}), but a claims file must be; run the study again."
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("claims"), list):
        raise StoreError("The claims file holds no list 'claims', but it must; run the study again to write one.")
    if document.get("schema") != _SCHEMA:
        raise StoreError(
            f"The claims file has schema {document.get('schema')!r}, but this version reads {_SCHEMA}; "
            "run the study again to write one."
        )
    return tuple(Claim.from_dict(row) for row in document["claims"])
