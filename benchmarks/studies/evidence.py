"""The page of all studies that have been run, made from their rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import ROWS, Row, markdown, with_range
from benchmarks.studies.catalogue import STUDIES, Study
from benchmarks.studies.methods import OURS, Method
from benchmarks.studies.papers import CLAIMS, Claim, Published
from benchmarks.studies.results import (
    Comparison,
    Summary,
    ToTarget,
    complete_seeds,
    difference,
    summarize,
    to_target,
)
from benchmarks.studies.statistics import Effect, effects_of
from benchmarks.studies.study import PLANS
from benchmarks.studies.tuning import TRIALS, about_trials, best_rates, with_rate
from train import plots
from train.output.run_folder import RunFolder

# What is left of each technique without its idea, or without a part of it.
NULLS = {
    "scale_by_random": (
        *("scale_by_mean", "scale_each_by_random", "scale_by_triangle"),
    ),
    "centralize": ("optax_centralize",),
    "barzilai_borwein_step": ("barzilai_borwein_step:min_scale=1:max_scale=1",),
    "perturbed_unit_step": ("normalize", "sam"),
}

RESULTS = Path(__file__).parents[1] / "results" / "studies"
DOCS = Path(__file__).parents[2] / "docs"
README = Path(__file__).parents[2] / "README.md"

# The table in the README is between these lines.
_BEGIN, _END = "<!-- studies -->\n", "<!-- end of studies -->\n"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A study with rows of at least two seeds.

    Attributes:
      study: the study.
      methods: its methods, with the learning rates that its trials chose.
      rows: its rows.
      seeds: the seeds that all methods have.
      plan: what was trained.
      summaries: the results of each method.
    """

    study: Study
    methods: Sequence[Method]
    rows: Sequence[Row]
    seeds: Sequence[int]
    plan: Mapping[str, Any]
    summaries: Sequence[Summary]

    @property
    def targets(self) -> list[ToTarget]:
        """What each method needs to reach the target."""
        task = self.study.config().study_task
        return to_target(self.rows, self.methods, task)[1]


def read(study: Study) -> Finished | None:
    """Reads the rows of a study; None if two seeds are not finished."""
    folder = RunFolder(RESULTS / study.name, {}, writes=False)
    rows, config = folder.read(ROWS), study.config()
    if not rows:
        return None
    methods: Sequence[Method] = config.methods
    if config.trials:
        best = best_rates(folder.read(TRIALS), config)
        methods = [with_rate(method, best[method.name]) for method in methods]
    seeds = complete_seeds(rows, methods)
    if len(seeds) < 2:
        return None
    return Finished(
        study=study,
        methods=methods,
        rows=rows,
        seeds=seeds,
        plan=folder.read(PLANS)[-1],
        summaries=summarize(rows, methods, config.study_task),
    )


def finished_studies() -> list[Finished]:
    """Returns all studies that have results."""
    found = map(read, STUDIES.values())
    return [each for each in found if each is not None]


def write_page(folder: Path = DOCS, readme: Path = README) -> None:
    """Writes the page `studies.md`, its figures, and the table of the README."""
    studies = finished_studies()
    (folder / "studies.md").write_text(page(studies))
    before, _, rest = readme.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    readme.write_text(f"{before}{_BEGIN}\n{overview(studies)}\n{_END}{after}")
    plots.save_differences(
        {
            technique: [
                (each.study.name, effect.interval, effect.helps or effect.hurts)
                for each in studies
                if (effect := _at_equal_gradients(each, technique))
            ]
            for technique in OURS
        },
        folder / "studies.png",
    )
    complete = [each for each in studies if _has_all(each)]
    plots.save_profiles(profiles(complete), folder / "profiles.png")


def _at_equal_gradients(each: Finished, technique: str) -> Effect | None:
    """Returns the effect of a technique in a study; None if it is not part of it."""
    for summary in each.summaries:
        if summary.method.name == technique:
            return summary.comparisons[-1].effect
    return None


def overview(studies: Sequence[Finished]) -> str:
    """Returns the table of the studies that have several techniques, in Markdown.

    A technique with two gradients is compared with twice the epochs of the baseline.
    """
    rows = []
    for each in studies:
        if len({method.name for method in each.methods} & set(OURS)) < 2:
            continue
        cells = (_marked(_at_equal_gradients(each, technique)) for technique in OURS)
        link = f"[{each.study.about}](docs/studies.md#{each.study.name})"
        rows.append((link, f"{len(each.seeds)}", *cells))
    return markdown(("study", "seeds", *OURS), rows)


def _marked(effect: Effect | None) -> str:
    """Returns a difference, in bold if it is clear."""
    if effect is None:
        return ""
    text = with_range(*effect.interval, "+.2f")
    return f"**{text}**" if effect.helps or effect.hurts else text


def _has_all(each: Finished) -> bool:
    return {method.name for method in each.methods}.issuperset(OURS)


def profiles(studies: Sequence[Finished]) -> dict[str, list[float]]:
    """Returns how many times the gradients of the best method each one needs.

    Only methods that all studies have are compared; the first baseline is "baseline".

    Returns:
      For each method, a ratio per study; infinity where it does not reach the target.
    """
    needed = []
    for each in studies:
        found = {target.method.name: target.gradients for target in each.targets}
        found["baseline"] = found.pop(each.methods[0].name)
        needed.append(found)
    if not needed:
        return {}
    shared = [name for name in ("baseline", *OURS) if all(name in n for n in needed)]
    best = [min(found[name] for name in shared) for found in needed]
    return {
        name: [found[name] / least for found, least in zip(needed, best, strict=True)]
        for name in shared
    }


# --------------------------------- The page -------------------------------------------

_TOP = """# What has been found so far

```sh
python -m benchmarks studies list
python -m benchmarks studies run digits_nulls
python -m benchmarks studies report
```

The studies on this page are declared in
[catalogue.py](../benchmarks/studies/catalogue.py), and their rows are in
[results/studies](../benchmarks/results/studies). The first command lists them, the
second one runs one of them or adds seeds to it, and the third one makes this page from
the rows. [Which technique helps on your images](compare.md) explains the columns and
the verdicts. Each study is a small network on few images: what helps here need not help
elsewhere. The intervals belong to the learning rates that are shown. They leave out
that the trials might have chosen others.
"""

_FIGURE = """
[![differences of the four techniques from their baselines](studies.png)](studies.png)

The difference of each technique from its baseline with as many gradients, in points
with 95 % intervals; to the right is better. The baseline of a technique with two
gradients per step has twice the epochs. A filled dot marks a difference that is clear
after Holm's correction.
"""

_PROFILES = """
## Gradients to a target

![performance profiles of the four techniques](profiles.png)

These are the studies that have all four techniques. The target of a study is the worst
final score of its first baseline, and it is looked for at the points of the learning
curves. A line shows in which share of the studies a method reaches the target with at
most so many times the gradients of the best method. A study in which at most half of
the runs of a method reach the target never counts for it. With few studies, one study
is a large share.
"""

_PAPERS = """
## Beside the papers

"Ours" are the differences that our smaller studies found for the same technique, in
points with 95 % intervals. They have other networks, images and lengths of training,
and often other momenta and learning rates, so they neither confirm nor refute a claim
beside them.
"""


def page(studies: Sequence[Finished]) -> str:
    """Returns the page in Markdown."""
    names = {each.study.name: each for each in studies}
    parts = [_TOP, _FIGURE]
    parts += [_section(each) for each in studies]
    parts += [_PROFILES, _PAPERS]
    parts += [_claim(claim, names) for claim in CLAIMS]
    return "".join(parts)


def _section(each: Finished) -> str:
    """Returns the section of a study."""
    config = each.study.config()
    about = f"{each.study.about[0].upper()}{each.study.about[1:]}"
    header = (
        *("method", "rate", f"{config.study_task.title} %"),
        *("at equal epochs", "at equal gradients"),
    )
    table = markdown(header, list(map(_row, each.summaries)))
    return (
        f"\n## {each.study.name}\n\n{about}. "
        f"{each.plan['train_examples']:,} images to train and "
        f"{each.plan['eval_examples']:,} to test, epochs: {each.plan['epochs']}, "
        f"batches of {each.plan['batch_size']}, {len(each.seeds)} seeds. Learning "
        f"rates: {about_trials(config)}. {_environment(each.rows)}\n\n{table}\n"
        f"{_below(each)}\n{_against_nulls(each)}"
    )


def _row(summary: Summary) -> tuple[str, ...]:
    """Returns the row of a method."""
    failed = f" ({summary.failures} diverged)" if summary.failures else ""
    cells = ["baseline"] if not summary.comparisons else map(_cell, summary.comparisons)
    epochs, gradients = (*cells, "")[:2]
    return (
        summary.method.name,
        f"{summary.method.optimizer.learning_rate:g}",
        f"{summary.mean:.2f} ± {summary.std:.2f}{failed}",
        epochs,
        gradients,
    )


def _cell(comparison: Comparison) -> str:
    """Returns a difference, with its verdict if there is one."""
    effect = comparison.effect
    clear = f"{comparison.verdict}: " if effect.helps or effect.hurts else ""
    return f"{clear}{difference(comparison)}"


def _below(each: Finished) -> str:
    """Returns what the differences are against, and which would have been seen."""
    base = each.methods[0].name
    others = {
        summary.method.name: comparison.against
        for summary in each.summaries
        for comparison in summary.comparisons[:1]
        if comparison.against != base
    }
    against = "".join(
        f"; those of {', '.join(f'`{k}`' for k, v in others.items() if v == name)} are "
        f"from `{name}`"
        for name in dict.fromkeys(others.values())
    )
    if any(method.equal_gradients for method in each.methods):
        against += f"; those at equal gradients are from `{base}, 2x epochs`"
    effects = [c.effect for s in each.summaries for c in s.comparisons]
    seen = [f"{bound(e.detectable for e in effects):.2f}" for bound in (min, max)]
    return (
        f"Differences at equal epochs are from `{base}`{against}. Verdicts count all "
        f"{len(effects)} comparisons of the study. Differences of {seen[0]} to "
        f"{seen[1]} points, depending on the method, would have been seen with 80 % "
        "power."
    )


def _against_nulls(each: Finished) -> str:
    """Returns the table of techniques beside what is left without their ideas."""
    task = each.study.config().study_task
    names = {method.name for method in each.methods}
    pairs = [
        (technique, null)
        for technique, nulls in NULLS.items()
        for null in nulls
        if {technique, null} <= names
    ]
    if not pairs:
        return ""
    scores = {(row["method"], row["seed"]): row[task.score] for row in each.rows}
    effects = effects_of(
        [
            [
                100 * task.better(scores[technique, seed], scores[null, seed])
                for seed in each.seeds
            ]
            for technique, null in pairs
        ]
    )
    rows = [
        (
            *(technique, null, with_range(*effect.interval, "+.2f")),
            "better" if effect.helps else "worse" if effect.hurts else effect.verdict(),
        )
        for (technique, null), effect in zip(pairs, effects, strict=True)
    ]
    return (
        "\nEach technique beside what is left of it without its idea, at equal epochs. "
        f"Comparisons that the verdicts count: {len(pairs)}.\n\n"
        + markdown(("technique", "without its idea", "difference", "verdict"), rows)
    )


def _environment(rows: Sequence[Row]) -> str:
    """Returns all hardware and versions that the rows come from."""
    found = [row["environment"] for row in rows]
    parts = (
        {e["processor"] if "(cpu)" in e["device"] else e["device"] for e in found},
        {f"jax {e['jax']}" for e in found},
        {f"commit {e['commit']}" for e in found},
    )
    return f"{', '.join(text for part in parts for text in sorted(part))}."


def _claim(claim: Claim, studies: Mapping[str, Finished]) -> str:
    """Returns the part of the page about a table or figure of a paper."""

    def found(names: Sequence[str]) -> str:
        return "; ".join(_ours(claim, studies[n]) for n in names if n in studies)

    lines = f"\n### {claim.source}\n\n{claim.says[0].upper()}{claim.says[1:]}.\n"
    if claim.rows:
        rows = [_published(claim, row, studies) for row in claim.rows]
        head = (claim.metric, "published without", "with", "ours, same settings")
        lines += "\n" + markdown(head, rows)
    else:
        same = found(claim.paper) or f"not run, needs {claim.needs}"
        lines += f"\nWith the settings of the paper: {same}.\n"
    ours = found((*claim.lab, *claim.desk)) or "no study has been run yet"
    return f"{lines}\nOurs: {ours}.\n"


def _published(
    claim: Claim, row: Published, studies: Mapping[str, Finished]
) -> tuple[str, ...]:
    ours = f"not run: needs {claim.needs}"
    if row.study in studies:
        ours = _ours(claim, studies[row.study])
    return row.setting, row.without, row.technique, ours


def _ours(claim: Claim, each: Finished) -> str:
    """Returns the difference that a study found for the technique of a claim."""
    for summary in each.summaries:
        if summary.method.name == claim.technique and summary.comparisons:
            first = summary.comparisons[0]
            return (
                f"{each.study.about}: {difference(first)} points against "
                f"{first.against}, {len(each.seeds)} seeds"
            )
    return f"{each.study.about}: without this technique"
