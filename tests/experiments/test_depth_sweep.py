"""depth-sweep on its smallest preset: every part runs, and claims survive whatever of it is missing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradlab.analysis.claims import Verdict
from gradlab.errors import UsageError
from gradlab.experiments import depth_sweep
from gradlab.experiments.depth_sweep import PRESETS, PROFILED, STUDY, Settings
from gradlab.study import CellContext, parse_settings, settings_from
from gradlab.sweep.store import Run, create_run, save_cell

PARTS = ("train", "profile", "rate", "shatter", "arithmetic")


def smoke(*overrides):
    return parse_settings(STUDY, "smoke", overrides)


class PartOfRun(Run):
    """A run as it would be had only some of its cells finished, or had its settings been others."""

    def __init__(self, folder, keys, settings):
        super().__init__(folder)
        self._keys = keys
        self.manifest |= {"settings": settings}

    def cells(self):
        return [cell for cell in super().cells() if cell.key in self._keys]


class Lab:
    """Runs each cell once in the whole module, and shows runs made of any of them."""

    def __init__(self, out):
        self.run = create_run(out, STUDY.name, {"preset": "smoke", "settings": {}}, [])
        self.results, self.progress = {}, {}

    def finish(self, cell):
        if cell.key not in self.results:
            told = self.progress[cell.key] = []
            context = CellContext(
                device=torch.device("cpu"), data_dir=None, progress=lambda *report: told.append(report)
            )
            self.results[cell.key] = STUDY.run(cell, context)
            save_cell(self.run.folder, cell, self.results[cell.key], {})
        return self.results[cell.key]

    def show(self, settings, cells):
        for cell in cells:
            self.finish(cell)
        return PartOfRun(self.run.folder, {cell.key for cell in cells}, dataclasses.asdict(settings))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    torch.manual_seed(0)
    return Lab(tmp_path_factory.mktemp("runs"))


def cells_of(settings, *parts):
    return [cell for cell in STUDY.plan(settings) if cell.part in (parts or PARTS)]


# -- plan and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_pass_their_own_checks_and_keys_are_unique(preset):
    settings = parse_settings(STUDY, preset)
    cells = STUDY.plan(settings)
    assert len({cell.key for cell in cells}) == len(cells)
    assert len({cell.label for cell in cells}) == len(cells)
    assert {cell.part for cell in cells} == set(PARTS)
    assert all(cell.cost > 0 for cell in cells)
    count = len(settings.depth) * len(settings.net) * len(settings.norm) * settings.seeds
    assert sum(cell.part == "train" for cell in cells) == count


def test_settings_survive_the_manifest():
    import json

    settings = smoke("milestones=3,5", "lr=0.01")
    stored = json.loads(json.dumps(dataclasses.asdict(settings)))
    again = settings_from(STUDY, stored)
    assert again == settings
    assert [cell.key for cell in STUDY.plan(again)] == [cell.key for cell in STUDY.plan(settings)]


def test_more_seeds_keep_the_cells_there_are():
    two, three = ({cell.key for cell in STUDY.plan(smoke(f"seeds={n}"))} for n in (2, 3))
    assert two < three


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["size=16"], "Setting 'size' is 16, but task=digits has images of side 8, 4."),
        (["task=cifar10", "size=5"], "Setting 'size' is 5, but task=cifar10 has images of side 32, 16, 8, 4."),
        (["depth=20,57"], "Setting 'depth' takes depths 6k+2; got 57: take 56 or 62."),
        (["profile_depth=10"], "Setting 'profile_depth' takes depths 6k+2; got 10: take 8 or 14."),
        (["depth=2"], "Setting 'depth' must be at least 8; got 2."),
        (
            ["batch_size=1401"],
            "Setting 'batch_size' is 1401, but task=digits has 1,400 training images: take at most as many.",
        ),
        (
            ["profile_batch=2000"],
            "Setting 'profile_batch' is 2000, but task=digits has 1,400 training images: take at most as many.",
        ),
        (["init_none=he_normla"], "Unknown init_none value 'he_normla'. Did you mean 'he_normal'?"),
        (["init_batch=ortogonal"], "Unknown init_batch value 'ortogonal'. Did you mean 'orthogonal'?"),
        (["precision=float16"], "Unknown precision value 'float16'. Did you mean 'float32'?"),
        (["net=plane"], "Unknown net value 'plane'. Did you mean 'plain'?"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_what_would_fail_in_every_cell_is_refused_before(overrides, message):
    with pytest.raises(UsageError) as error:
        smoke(*overrides)
    assert str(error.value) == message


def test_sizes_and_counts_known_beforehand_are_those_of_the_tasks():
    from gradlab.tasks import load_digits
    from gradlab.tasks.image import allowed_sizes

    sizes, images = depth_sweep.TASKS["digits"]
    assert images == len(load_digits().train_labels)
    assert sorted(sizes) == [size for size in allowed_sizes(8) if size >= 4]
    sizes, images = depth_sweep.TASKS["cifar10"]
    assert images == 50_000
    assert sorted(sizes) == [size for size in allowed_sizes(32) if size >= 4]
    assert set(depth_sweep.TASKS) == set(
        next(f for f in dataclasses.fields(Settings) if f.name == "task").metadata["choices"]
    )


@pytest.mark.parametrize("override", ["task=cifar10", "size=4", "batch_size=1400", "depth=8", "init_none=orthogonal"])
def test_values_at_the_border_are_taken(override):
    assert smoke(override)


def test_listing_and_planning_load_no_torch():
    code = (
        "import sys; from gradlab.catalog import studies; from gradlab.study import parse_settings; "
        "study = studies()['depth-sweep']; study.plan(parse_settings(study, 'default')); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pandas', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- cells ------------------------------------------------------------------------------------------------------------


def test_train_cells(lab):
    settings = smoke()
    for cell in cells_of(settings, "train"):
        result = lab.finish(cell)
        assert result.status in ("done", "diverged")
        losses, ends = result.tables["losses"], result.tables["ends"]
        assert losses["step"].tolist() == list(range(len(losses)))
        assert len(losses) == 6 or result.status == "diverged"
        assert len(ends) == 1
        if result.status == "done":
            assert np.isfinite(losses["loss"]).all()
            assert 0 <= ends["test_error"][0] <= 100
            assert ends["diverged_at"][0] == -1
            # The first and the last step are among those recorded.
            assert {0, 5} <= set(result.trace.steps["step"]) <= set(range(6))
        assert [done for done, _, _ in lab.progress[cell.key]] == list(range(1, len(losses) + 1))
    results = {cell.label: lab.finish(cell).tables["losses"]["loss"][0] for cell in cells_of(settings, "train")}
    assert len(set(results.values())) == len(results)  # every cell is a net of its own


def test_a_train_cell_uses_its_settings(lab):
    # A rate of nothing leaves the loss to the batches alone; warm-up, milestones and decay reach the loop.
    cells = cells_of(
        smoke("seeds=1", "net=plain", "norm=batch", "depth=8", "warmup_steps=2", "warmup_lr=0.003", "milestones=4"),
        "train",
    )
    steps = lab.finish(cells[0]).trace.steps.set_index("step")["learning_rate"]
    expected = [0.003, 0.003, 0.1, 0.1, 0.01, 0.01]
    assert steps.to_dict() == pytest.approx({step: expected[step] for step in steps.index})


def test_a_diverged_cell_is_a_result(lab):
    settings = smoke("seeds=1", "net=residual", "norm=none", "depth=14", "lr=1e30")
    (cell,) = cells_of(settings, "train")
    result = lab.finish(cell)
    assert result.status == "diverged"
    step = result.tables["ends"]["diverged_at"][0]
    assert result.message == f"the loss was not finite at step {step}"
    assert math.isnan(result.tables["ends"]["test_error"][0])
    found = {claim.id: claim for claim in STUDY.claims(lab.show(settings, [cell]))}
    assert found["C2.3 residual"].measured == math.inf
    assert "1 of 1 diverged" in found["C2.3 residual"].detail


def test_profile_cells(lab):
    for cell in cells_of(smoke(), "profile"):
        layers = lab.finish(cell).trace.layers
        assert set(layers["net"]) == set(PROFILED)
        blocks = (cell.settings["depth"] - 2) // 2
        for name, net in layers.groupby("net"):
            assert net["layer"].str.endswith(".activation").sum() == blocks
            assert (net["layer"] == "stem.relu").sum() == 1
            # SkipInit's alpha starts at 0 and lets nothing back through the branch.
            closed = net["layer"].str.endswith(".to_branch") & (name == "residual, SkipInit")
            assert ((net["grad_norm"] > 0) == ~closed).all()


def test_profile_starts_from_the_same_images_whatever_the_depth(lab):
    first, second = cells_of(smoke("seeds=1", "profile_depth=8,14"), "profile")
    stems = [
        lab.finish(cell).trace.layers.query("layer == 'stem.relu' and net == 'plain, He'")["act_norm"].item()
        for cell in (first, second)
    ]
    assert stems[0] == stems[1]


def test_rate_shatter_and_arithmetic_cells(lab):
    settings = smoke()
    for cell in cells_of(settings, "rate"):
        tables = lab.finish(cell).tables
        assert tables["explosion"]["place"].tolist() == list(range(1, 41))
        assert tables["explosion"]["log_grad_norm"].iloc[0] > tables["explosion"]["log_grad_norm"].iloc[-1]
        assert tables["shares"]["block"].tolist() == list(range(1, 51))
    (shatter,) = cells_of(settings, "shatter")
    frame = lab.finish(shatter).tables["shattering"]
    assert frame.groupby("kind")["draw"].nunique().to_dict() == {
        "plain-24": 2, "residual-50 beta=0.1": 2, "residual-50 beta=1": 2,
    }  # fmt: skip
    assert (frame[frame["lag"] == 0]["autocorrelation"] == 1).all()
    (arithmetic,) = cells_of(settings, "arithmetic")
    tables = lab.finish(arithmetic).tables
    assert dict(tables["counts"].values.tolist())[110] == 1_727_962
    assert tables["vgg"]["quotient"].item() == pytest.approx(16_728.76, rel=1e-6)


def test_cells_repeat(lab):
    (cell, *_) = cells_of(smoke(), "train")
    again = STUDY.run(cell, CellContext(device=torch.device("cpu"), data_dir=None, progress=lambda *_: None))
    torch.manual_seed(99)
    assert again.tables["losses"].equals(lab.finish(cell).tables["losses"])


def test_stopping_a_cell_ends_it(lab):
    class Stopped(BaseException):
        pass

    def progress(*_):
        raise Stopped

    for part in ("train", "profile", "shatter"):
        cell = cells_of(smoke(), part)[0]
        with pytest.raises(Stopped):
            STUDY.run(cell, CellContext(device=torch.device("cpu"), data_dir=None, progress=progress))


# -- claims -----------------------------------------------------------------------------------------------------------


def decided(run):
    claims = STUDY.claims(run)
    found = {claim.id: claim for claim in claims}
    assert len(found) == len(claims)
    for claim in claims:
        assert claim.statement
        assert claim.source
        assert "nan" not in claim.statement
        if claim.verdict is Verdict.NOT_DECIDED and math.isnan(claim.p_value):  # else p says why
            assert claim.detail, claim.id
    return found


#: Claims that each part decides.
DECIDES = {
    "train": ("C2.2", "C2.3 plain", "C2.3 residual", "C2.6", "C2.1 error"),
    "profile": ("C2.3 vanish", "C2.3 explode", "C2.3 power", "C2.3 flat"),
    "rate": ("C2.4", "C3.4"),
    "shatter": ("C2.5",),
    "arithmetic": ("C1.5", "C2.1 size"),
}


def test_claims_of_the_whole_run(lab):
    settings = smoke()
    found = decided(lab.show(settings, cells_of(settings)))
    for prefix in (prefix for prefixes in DECIDES.values() for prefix in prefixes):
        assert any(key.startswith(prefix) for key in found), prefix
    assert found["C1.5"].verdict is found["C2.1 size"].verdict is Verdict.REPRODUCED
    assert found["C2.2a"].n == 2
    assert found["C2.1 error"].verdict is Verdict.NOT_DECIDED


@pytest.mark.parametrize("missing", PARTS)
def test_claims_without_a_part(lab, missing):
    settings = smoke()
    cells = [cell for cell in cells_of(settings) if cell.part != missing]
    whole, found = decided(lab.show(settings, cells_of(settings))), decided(lab.show(settings, cells))
    for key, claim in whole.items():
        if not key.startswith(DECIDES[missing]):
            assert found[key].verdict is claim.verdict
    for key, claim in found.items():
        if key.startswith(DECIDES[missing]):
            assert claim.verdict is Verdict.NOT_DECIDED
            assert claim.n == 0


@pytest.mark.parametrize("only", PARTS)
def test_claims_of_one_part(lab, only):
    settings = smoke()
    found = decided(lab.show(settings, cells_of(settings, only)))
    for key, claim in found.items():
        if not key.startswith(DECIDES[only]):
            assert claim.verdict is Verdict.NOT_DECIDED, key


@pytest.mark.parametrize("only", PARTS)
def test_claims_of_one_cell(lab, only):
    settings = smoke()
    found = decided(lab.show(settings, cells_of(settings, only)[:1]))
    decisive = {key for key, claim in found.items() if claim.verdict is not Verdict.NOT_DECIDED}
    # One of these cells is its whole part; the others are one seed, which decides nothing.
    whole = DECIDES[only] if only in ("arithmetic", "shatter") else ()
    assert all(key.startswith(whole) for key in decisive)


def test_claims_of_nothing(lab):
    assert {claim.verdict for claim in decided(lab.show(smoke(), [])).values()} == {Verdict.NOT_DECIDED}


@pytest.mark.parametrize("stop", range(1, 8))
def test_claims_of_a_run_interrupted_anywhere(lab, stop):
    # Cells end in any order, so a stopped run lacks any of them.
    settings = smoke()
    cells = cells_of(settings)
    shuffled = [cells[place] for place in np.random.default_rng(stop).permutation(len(cells))]
    decided(lab.show(settings, shuffled[: stop * len(cells) // 8]))


SUBSETS = [
    ["net=plain"],
    ["net=residual"],
    ["norm=batch"],
    ["norm=none"],
    ["depth=8"],
    ["depth=14"],
    ["profile_depth=8"],
    ["seeds=1"],
    ["net=plain", "norm=none", "depth=8", "profile_depth=8", "seeds=1"],
    ["net=residual", "norm=batch", "depth=14", "profile_depth=14"],
]


@pytest.mark.parametrize("overrides", SUBSETS, ids=" ".join)
def test_claims_of_smaller_grids(lab, overrides):
    settings = smoke(*overrides)
    found = decided(lab.show(settings, cells_of(settings)))
    if any(word in " ".join(overrides) for word in ("net=", "norm=none", " depth=", "seeds=1")):
        assert found["C2.2a"].verdict is found["C2.2c"].verdict is Verdict.NOT_DECIDED
    assert found["C1.5"].verdict is Verdict.REPRODUCED


def test_the_papers_recipe_is_judged_by_table_6(lab):
    settings = dataclasses.asdict(smoke()) | {"steps": 64_000, "augment": True, "size": 32, "width": 16}
    cells = cells_of(smoke(), "train")
    for cell in cells:
        lab.finish(cell)
    found = decided(PartOfRun(lab.run.folder, {cell.key for cell in cells}, settings))
    assert "Needs the paper's recipe" not in found["C2.1 error"].detail
    assert found["C2.1 error"].detail == "No finished cell measured this."  # no net of Table 6's depths
