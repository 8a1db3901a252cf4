"""The declared studies, the claims of the papers, and the page of what was found."""

import json
import math
import re
import statistics

import pytest

from benchmarks.studies import declared, evidence
from benchmarks.studies.catalogue import STUDIES
from benchmarks.studies.evidence import Finished, finished_studies, page, profiles
from benchmarks.studies.methods import OURS
from benchmarks.studies.papers import CLAIMS
from train.errors import UsageError
from train.tasks.recipes import RECIPES

FINISHED = finished_studies()


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_has_settings_that_fit_its_task(study):
    config = study.config()  # refuses what does not fit
    assert len(config.methods) >= 2
    if study.scale == "paper":
        recipe = RECIPES[config.recipe]()
        run = config.run_config(config.methods[0], config.usual_epochs, 1)
        assert (run.epochs, run.data.augment) == (recipe.epochs, recipe.data.augment)
        assert config.usual_batch_size == recipe.batch_size
    else:
        assert config.seeds >= 5


def test_claims_name_studies_that_test_their_technique():
    named = {name for claim in CLAIMS for name in claim.studies}
    assert named == set(STUDIES)
    for claim in CLAIMS:
        for scale in ("paper", "lab", "desk"):
            for name in getattr(claim, scale):
                assert STUDIES[name].scale == scale
        for row in claim.rows:
            if row.study:
                methods = STUDIES[row.study].config().methods
                (method,) = (m for m in methods if m.name == claim.technique)
                assert method.baseline == methods[0].name
    # All tables of the papers with numbers.
    numbers = [row for claim in CLAIMS for row in claim.rows]
    assert len(numbers) == 4 + 5 + 5 + 5 + 6 + 4 + 4 + 4


def test_a_technique_is_compared_with_what_is_left_without_its_idea():
    text = page([each for each in FINISHED if each.study.name == "digits_nulls"])
    for technique, nulls in evidence.NULLS.items():
        assert technique in OURS
        for null in nulls:
            (line,) = re.findall(rf"^\| {technique} \| {null} \| (.+) \|$", text, re.M)
            assert re.match(r"[+-]\d\.\d\d \[", line)
    by_hand = [
        100 * (random["accuracy"] - mean["accuracy"])
        for seed in range(10)
        for random, mean in [
            (row_of("scale_by_random", seed), row_of("scale_by_mean", seed))
        ]
    ]
    mean = statistics.mean(by_hand)
    assert f"| scale_by_random | scale_by_mean | {mean:+.2f} [" in text


def row_of(method, seed):
    rows = next(e.rows for e in FINISHED if e.study.name == "digits_nulls")
    (row,) = (r for r in rows if (r["method"], r["seed"]) == (method, seed))
    return row


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gc_decay_1e-3",
            {"weight_decay": 1e-3, "learning_rate": 0.1, "conv_only": True},
        ),
        ("gc_rate_adam_0.0015", {"optimizer": "adam", "learning_rate": 0.0015}),
        ("gc_rate_sgd_0.05", {"learning_rate": 0.05, "milestones": (60, 120, 180)}),
        ("gc_optimizers_adamw", {"weight_decay": 1e-3, "learning_rate": 1e-3}),
        ("gc_optimizers_adagrad", {"weight_decay": 5e-4, "learning_rate": 0.01}),
        ("rg_voc_3", {"learning_rate": 0.01, "momentum": 0.9, "probability": 0.5}),
        ("rg_voc_4", {"learning_rate": 1e-4, "momentum": 0.95, "schedule": "poly"}),
        ("rg_duc_0", {"learning_rate": 1e-3, "momentum": 0.0}),
        ("rg_cifar10_resnet34", {"momentum": 0.5, "weight_decay": 1e-4}),
        ("gc_aircraft", {"head_learning_rate": 0.1, "milestones": (50, 80)}),
        ("step_tuned_cifar10", {"momentum": 0.0, "schedule": "robbins_monro"}),
        ("pugd_upanet16", {"learning_rate": 0.1, "schedule": "cosine"}),
    ],
)
def test_settings_of_the_papers_reach_the_technique(name, expected):
    config = STUDIES[name].config()
    (claim,) = {c.technique for c in CLAIMS if name in c.studies}
    (method,) = (m for m in config.methods if m.name == claim)
    run = config.run_config(method, config.usual_epochs, 1).optimizer
    assert {key: getattr(run, key) for key in expected} == expected
    assert run.techniques == (claim,)


######## The page #####################################################################


def test_the_page_is_that_of_the_rows(tmp_path):
    assert (evidence.DOCS / "studies.md").read_text() == page(FINISHED)
    assert len(FINISHED) >= 1
    readme = tmp_path / "README.md"
    readme.write_text(evidence.README.read_text().replace("**", ""))
    evidence.write_page(tmp_path, readme)
    assert evidence.overview(FINISHED) in readme.read_text()
    assert evidence.overview(FINISHED) in evidence.README.read_text()
    for name in ("studies.png", "profiles.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert (evidence.DOCS / name).exists()


def test_the_overview_marks_what_is_clear():
    (each,) = (each for each in FINISHED if each.study.name == "digits_nulls")
    header, _, row = evidence.overview([each]).splitlines()
    assert header.split(" | ")[2:] == [*OURS[:-1], f"{OURS[-1]} |"]
    _, about, seeds, *cells, _ = map(str.strip, row.split("|"))
    assert (about, seeds) == (
        f"[{each.study.about}](docs/studies.md#digits_nulls)",
        "10",
    )
    for technique, cell in zip(OURS, cells, strict=True):
        (summary,) = (s for s in each.summaries if s.method.name == technique)
        last = summary.comparisons[-1]
        assert last.equal == (
            "gradients" if summary.method.equal_gradients else "epochs"
        )
        mean, low, high = map(float, re.findall(r"[+-][\d.]+", cell))
        assert (mean, low, high) == pytest.approx(last.effect.interval, abs=0.005)
        assert cell.startswith("**") == (last.effect.helps or last.effect.hurts)


def test_every_published_number_has_ours_or_what_it_needs():
    text = page(FINISHED)
    for claim in CLAIMS:
        assert f"### {claim.source}\n" in text
        for row in claim.rows:
            (line,) = [
                line
                for line in text.splitlines()
                if line.startswith(f"| {row.setting} | {row.without} | {row.technique}")
            ]
            assert "not run: needs " in line or "points against" in line


@pytest.mark.parametrize("each", FINISHED, ids=lambda each: each.study.name)
def test_committed_rows_are_those_of_the_study(each):
    folder = evidence.RESULTS / each.study.name
    written = json.loads((folder / "config.json").read_text())["config"]
    config = json.loads(json.dumps(each.study.config().described(), default=str))
    differing = {
        name for name in written if written[name] != config[name] and name != "methods"
    }
    assert differing <= {"weights"}
    assert set(written["methods"]) == set(config["methods"])
    runs = [(row["method"], row["seed"]) for row in each.rows]
    assert len(runs) == len(set(runs))
    assert each.plan["epochs"] == each.study.config().usual_epochs
    for text in (path.read_text() for path in folder.glob("*.json*")):
        assert "/work" not in text
        assert "/home" not in text


def _study(targets):
    """A study whose methods need so many gradients."""

    class Study(Finished):
        __slots__ = ()

        @property
        def targets(self):
            return targets

    methods = [target.method for target in targets]
    return Study(
        study=STUDIES["digits_nulls"],
        methods=methods,
        rows=[],
        seeds=[0, 1],
        plan={},
        summaries=[],
    )


def test_a_profile_divides_by_the_best_method_of_each_study():
    methods = STUDIES["cifar10_1000_tuned"].config().methods

    def targets(**gradients):
        return [
            evidence.ToTarget(
                method=method, reached=1, runs=1, gradients=float(count), seconds=1.0
            )
            for method in methods
            for name, count in gradients.items()
            if method.name == name
        ]

    two = [
        _study(targets(sgd=10, centralize=5, perturbed_unit_step=20)),
        _study(targets(sgd=10, centralize=math.inf)),
    ]
    assert profiles(two) == {"baseline": [2.0, 1.0], "centralize": [1.0, math.inf]}
    assert profiles([]) == {}


######## The command ##################################################################


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "name the study to run"),
        (("run", "digits_null"), "unknown study 'digits_null'; did you mean digits_n"),
        (("run", "gc_cars"), "gc_cars starts from pretrained weights: set weights"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        declared.studies(*arguments)


def test_a_study_is_run_in_its_folder_with_its_settings(monkeypatch):
    calls = []
    monkeypatch.setattr(declared, "compare", lambda *arguments: calls.append(arguments))
    declared.studies("run", "digits_nulls", seeds=12, runners=2)
    ((config, folder),) = calls
    assert folder == evidence.RESULTS / "digits_nulls"
    assert (config.seeds, config.runners, config.trials) == (12, 2, 3)
    own = STUDIES["digits_nulls"].config()
    assert config.described() == own.described()


def test_the_list_has_every_study_and_claim(capsys):
    declared.studies("list")
    printed = " ".join(capsys.readouterr().out.split())
    for name in STUDIES:
        assert name in printed
    for claim in CLAIMS:
        assert claim.source in printed
