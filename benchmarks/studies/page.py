"""The results of a study as one HTML page that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from benchmarks.report import Cells
from benchmarks.studies.results import (
    TARGET_HEADER,
    VERDICT_HEADER,
    Comparison,
    Summary,
    cells_of,
    difference,
    header,
    verdict_cells,
)
from benchmarks.studies.tasks import StudyTask

_PAGE = Path(__file__).with_name("page.html")
_LEGEND = (
    "p (Holm): Student's p-value, adjusted for all comparisons of the study. p (sign "
    "flips): exact permutation test of each comparison alone, which needs no normal "
    "distribution. Seeds better: ties count half. Time: training time divided by that "
    "of the other method. At equal gradients, the other method trains for twice the "
    "epochs."
)


def render(
    *,
    title: str,
    subtitle: str,
    summaries: Sequence[Summary],
    task: StudyTask,
    settings: Mapping[str, str],
    about: str,
    times: Sequence[Cells],
    about_times: str,
    figure: bytes,
    environment: Mapping[str, str],
    command: str,
) -> str:
    """Returns the page.

    Args:
      title: the question.
      subtitle: what was done, in a sentence.
      summaries: the results of each method.
      task: the task.
      settings: the settings of the study, in words.
      about: what the differences are.
      times: rows of the table of what the target takes.
      about_times: what the target is.
      figure: the learning curves, a PNG file.
      environment: versions and hardware.
      command: the command that made the page.
    """
    # The cards have the verdicts.
    numbers = [cells[:-1] for each in summaries for cells in verdict_cells(each)]
    compared = [summary for summary in summaries if summary.comparisons]
    return Template(_PAGE.read_text()).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        cards="\n".join(map(_card, compared)),
        about=escape(about),
        methods=_table(header(task), [cells_of(summary) for summary in summaries]),
        figure=base64.b64encode(figure).decode(),
        comparisons=_table(VERDICT_HEADER[:-1], numbers),
        legend=escape(_LEGEND),
        times=_table(TARGET_HEADER, times),
        about_times=escape(about_times),
        settings=_list(settings),
        optimizers=_table(_OPTIMIZER_HEADER, list(map(_optimizer_cells, summaries))),
        command=escape(command),
        environment=_list(environment),
    )


def _card(summary: Summary) -> str:
    """Returns the verdicts on a technique, colored by the one at equal epochs."""
    first = summary.comparisons[0].effect
    kind = "helps" if first.helps else "hurts" if first.hurts else "none"
    lines = "".join(map(_verdict, summary.comparisons))
    return (
        f'<div class="card {kind}"><h3>{escape(summary.method.name)}</h3>{lines}</div>'
    )


def _verdict(comparison: Comparison) -> str:
    effect = comparison.effect
    kind = "helps" if effect.helps else "hurts" if effect.hurts else "none"
    head, _, rest = comparison.verdict.partition("; ")
    rest = f"; {rest}" if rest else ""
    return (
        f'<p class="{kind}">At equal {comparison.equal}: <b>{escape(head)}</b>'
        f'{escape(rest)}.<br><span class="quiet">{escape(difference(comparison))} '
        f"against {escape(comparison.against)}, in {comparison.seconds_ratio:.2f} "
        "times its time</span></p>"
    )


_OPTIMIZER_HEADER = (
    *("method", "optimizer", "learning rate", "momentum", "weight decay", "schedule"),
    "epochs",
)


def _optimizer_cells(summary: Summary) -> tuple[str, ...]:
    optimizer, factor = summary.method.optimizer, summary.method.epochs_factor
    return (
        summary.method.name,
        optimizer.optimizer,
        f"{optimizer.learning_rate:g}",
        f"{optimizer.momentum:g}",
        f"{optimizer.weight_decay:g}",
        optimizer.schedule,
        f"x {factor}",
    )


def _table(head: Cells, rows: Sequence[Cells]) -> str:
    """Returns a table; long cells may wrap."""
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > 40 else ""
    return f"<td{kind}>{escape(text)}</td>"


def _list(values: Mapping[str, str]) -> str:
    items = (
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{''.join(items)}</dl>"
