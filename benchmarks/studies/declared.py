"""The command that lists, runs and reports the declared studies."""

from pathlib import Path
from typing import Literal

import tyro

from benchmarks.report import make_table
from benchmarks.studies import evidence
from benchmarks.studies.catalogue import STUDIES
from benchmarks.studies.compare import compare
from benchmarks.studies.evidence import RESULTS
from benchmarks.studies.papers import CLAIMS
from train.errors import UsageError
from train.progress import make_console
from train.settings import Positive, unknown_name


def studies(
    action: tyro.conf.Positional[Literal["list", "run", "report"]],
    name: tyro.conf.Positional[str | None] = None,
    seeds: Positive[int] | None = None,
    runners: Positive[int] = 1,
    ray: str | None = None,
    weights: Path | None = None,
    run_dir: Path | None = None,
) -> None:
    """List the declared studies, run one of them, or make the page of all results.

    Args:
      action: `list` shows the studies, and the claims of the papers that they go
        with. `run` trains the runs of a study that have no row yet. `report` writes
        docs/studies.md and its figures from the rows.
      name: the study to run.
      seeds: runs of each method, if not as many as declared.
      runners: processes that share the runs.
      ray: address of a Ray cluster whose workers are the runners, or `auto`.
      weights: pretrained weights that all runs start from.
      run_dir: folder of the rows; that of the study in benchmarks/results/studies if
        unset.
    """
    if action == "list":
        _list()
    elif action == "report":
        evidence.write_page()
        make_console().print(f"Written to {evidence.DOCS / 'studies.md'}")
    elif name is None:
        raise UsageError("name the study to run; python -m benchmarks studies list")
    elif name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    elif STUDIES[name].pretrained and weights is None:
        raise UsageError(f"{name} starts from pretrained weights: set weights")
    else:
        changes = {"seeds": seeds, "ray": ray, "weights": weights}
        given = {key: value for key, value in changes.items() if value is not None}
        config = STUDIES[name].config(runners=runners, **given)
        compare(config, run_dir or RESULTS / name)


def _list() -> None:
    console = make_console()
    finished = {each.study.name: each for each in evidence.finished_studies()}
    rows = []
    for study in STUDIES.values():
        done = (
            f"{len(finished[study.name].seeds)} seeds" if study.name in finished else ""
        )
        rows.append((study.name, study.scale, study.about, done))
    console.print(make_table(("study", "scale", "about", "seeds"), rows))
    console.print()
    for claim in CLAIMS:
        console.print(f"{claim.source}: {claim.says}")
        console.print(f"  {', '.join(claim.studies) or 'no study'}")
        console.print(f"  the settings of the paper need {claim.needs}")
