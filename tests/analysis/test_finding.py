"""Findings and diagnoses as records: text, JSON there and back, HTML that runs nothing."""

import json
import math

import pytest

from gradlab.analysis.finding import Diagnosis, Evidence, Finding
from gradlab.errors import StoreError, UsageError

FINDING = Finding(
    kind="vanishing", axis="depth", layers=("a", "b"), steps=(0, 9), severity=0.5,
    evidence=(Evidence(what="slope", value=-0.4, low=-0.5, high=-0.3, unit="decades a layer", threshold="< 0"),
              Evidence(what="ratio", value=math.inf)),
    cause="small weights", advice="use He's initialization", source="He et al. 2015",
)  # fmt: skip


def test_a_diagnosis_survives_json():
    told = Diagnosis(findings=(FINDING, Finding(kind="dead", timesteps=(0, 3))), notes=("Time was not watched.",))
    again = Diagnosis.from_json(told.to_json())
    assert str(again) == str(told)  # NaN is not equal to itself, its text is
    assert again.findings[0].layers == ("a", "b")
    assert again.findings[0].evidence[1].value == math.inf
    assert json.loads(told.to_json())["healthy"] is False


def test_text_names_place_evidence_cause_and_source():
    text = str(Diagnosis(findings=(FINDING,)))
    assert text.startswith("1 finding by the rules 'gradlab'\n1. vanishing through depth: a, b; training steps 0 to 9")
    assert "slope: -0.4 [-0.5, -0.3] decades a layer (rule: < 0)" in text
    assert "try: use He's initialization (He et al. 2015)" in text


def test_many_layers_are_shortened():
    where = Finding(kind="dead", layers=tuple("abcdefg"), steps=(3, 3)).where
    assert where == "a, b, ..., f, g (7 in all); training step 3"


def test_html_escapes_what_the_user_named():
    page = Diagnosis(findings=(Finding(kind="dead", layers=("<script>alert(1)</script>",)),))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "healthy" in Diagnosis()._repr_html_()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "gradlab diagnosis", "schema_version": 99}', '{"format": 3}'],
    ids=["empty", "list", "object", "newer", "number"],
)  # fmt: skip
def test_what_is_no_diagnosis_is_refused(text):
    with pytest.raises(StoreError, match="This JSON is no diagnosis"):
        Diagnosis.from_json(text)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match=r"Unknown kind of finding 'vanish'\. Did you mean 'vanishing'"):
        Finding(kind="vanish")
