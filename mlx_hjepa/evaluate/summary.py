"""Reports as people read them: a table for the terminal, report.md, and several runs side by side."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from mlx_hjepa.evaluate.report import report_name
from mlx_hjepa.run import Run, write_atomically

Report = dict[str, Any]


def table(report: Report) -> Table:
    """Every subject and level of one report."""
    data = report["dataset"]
    out = Table(title=f"{report['run']}: {data['name']}, {data['test']:,} test pictures, {report['encoder']} encoder")
    headings = ("features", "level", "k-NN, k 20", "linear probe", "effective rank")
    for heading in headings:
        out.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for name, levels in report["rows"].items():
        for level, scores in levels.items():
            out.add_row(*_cells(name, level, scores))
        out.add_section()
    for name, label in (("fine_tune", "fine-tuned"), ("scratch", "from scratch")):
        if name in report:
            out.add_row(label, f"{report[name]['epochs']} epochs", "", percent(report[name]), "")
    return out


def _cells(name: str, level: str, scores: Report) -> list[str]:
    shown = "-" if name == "raw" else f"depth {level}" if level.isdigit() else level
    return [name, shown, percent(scores.get("knn")), percent(scores.get("linear")),
            f"{scores['effective_rank']:.0f} of {scores['dim']}"]


def percent(score: Report | None) -> str:
    """67.3 ± 0.9 %: an accuracy and half its Wilson interval."""
    if not score:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ± {50 * (high - low):.1f} %"


def markdown(run: Run, report: Report) -> str:
    """report.md: the tables of every protocol that ran, and where the numbers come from."""
    data = report["dataset"]
    text = [f"# {report['run']}", "",
            f"{data['name']}, {data['test']:,} test pictures, bank of {data['train']:,}; frozen {report['encoder']} "
            f"encoder, {report['views']}, {report['epochs']} epochs, seed {report['seed']}. ± is half of Wilson's 95 % "
            "interval.", ""]
    if data["note"]:
        text += [f"{data['note']}.", ""]
    if "verdict" in report:
        text += [f"**Features: {report['verdict']}** ({report['reason']}).", ""]
    text += _grid(["features", "level", "k-NN k 20, T 0.07", "linear probe", "effective rank"],
                  [_cells(name, level, scores) for name, levels in report["rows"].items()
                   for level, scores in levels.items()])
    for name, label in (("fine_tune", "Fine-tuned"), ("scratch", "The same network from scratch")):
        if name in report:
            f = report[name]
            text += [f"{label}: {percent(f)} after epoch {f['epoch']} of {f['epochs']}, chosen on {f['held_out']:,} "
                     f"held-out pictures, trained on {f['trained_on']:,}.", ""]
    text += _sweep(report) + _few_shot(report) + _quality(report)
    text += ["## Where this comes from", "", *(f"- {key}: {report[key]}" for key in (
        "command", "checkpoint", "weights", "pictures_seen", "train_seconds", "commit", "versions") if key in report),
        f"- device: {report['device']['name']}; evaluation took {report['seconds']:.0f} s"]
    return "\n".join(text) + "\n"


def _grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [" | ".join(headings), " | ".join("---" for _ in headings), *(" | ".join(row) for row in rows)]
    return [*(f"| {line} |" for line in lines), ""]


def _sweep(report: Report) -> list[str]:
    rows = []
    for name, levels in report["rows"].items():
        for level in ("last", "levels"):
            sweep = levels.get(level, {}).get("knn", {}).get("sweep", [])
            if sweep:
                best = {(s["k"], s["T"]): s["accuracy"] for s in sweep}
                wanted = [(k, 0.07) for k in (1, 5, 10, 20, 50, 100, 200)] + [(200, 0.1)]
                rows.append([name, level, *(f"{100 * best[w]:.1f}" if w in best else "-" for w in wanted)])
    heads = ["features", "level", *(f"k {k}" for k in (1, 5, 10, 20, 50, 100, 200)), "k 200, T 0.1 (lightly)"]
    return ["## k-NN, T 0.07", "", *_grid(heads, rows)] if rows else []


def _few_shot(report: Report) -> list[str]:
    text: list[str] = []
    for kind, title in (("episodes", "Few-shot episodes, nearest centroid"), ("labels", "k labels a class")):
        rows = []
        for name, levels in report["rows"].items():
            for level, scores in levels.items():
                found = scores.get("few_shot", {}).get(kind)
                if found and "skipped" in found and "per_class" not in found:
                    rows.append([name, level, str(found["skipped"])])
                elif found and kind == "episodes":
                    rows.append([name, level, ", ".join(f"{k}-shot {_spread(s)}" for k, s in found["shots"].items())])
                elif found:
                    rows.append([name, level, "; ".join(
                        f"{k}: centroid {_spread(s['centroid'])}, logistic {_spread(s['logistic'])}"
                        for k, s in found["per_class"].items())])
        if rows:
            text += [f"## {title}", "", *_grid(["features", "level", "accuracy, 95 % interval"], rows)]
    return text


def _spread(score: Report) -> str:
    return f"{100 * score['accuracy']:.1f} ± {50 * (score['interval'][1] - score['interval'][0]):.1f} %"


def _quality(report: Report) -> list[str]:
    if "quality" not in report:
        return []
    keys = ("effective_rank", "rankme", "alpha_req", "normalised_std", "uniformity")
    rows = [[name, level, *("-" if values[k] is None else f"{values[k]:.3g}" for k in keys),
             f"{values['cosine']['mean']:.2f}", values.get("verdict", "-")]
            for name, found in report["quality"].items() for level, values in found["by_level"].items()]
    text = ["## Feature quality", "", *_grid(["features", "level", "effective rank", "RankMe", "alpha-ReQ",
                                              "normalised std", "uniformity", "mean cosine", "verdict"], rows)]
    for name, found in report["quality"].items():
        if found["views"]:
            v = found["views"]
            text += [f"{name}: LiDAR {v['lidar']:.1f} and alignment {v['alignment']:.3f} over {v['pictures']:,} "
                     f"pictures x {v['views']} views.", ""]
    return text


def write(run: Run, report: Report) -> None:
    """report.md and the pictures, beside report.json."""
    from mlx_hjepa.plots.evaluation import draw

    name = report_name(report)
    write_atomically(run.evaluation / f"{name}.md", markdown(run, report))
    draw(report, run.evaluation, name)


def comparison(reports: list[Report]) -> Table:
    """Several runs side by side. Runs of one preset and different seeds are pooled below as mean and spread.

    A `~` marks what is within the noise of the best: a difference under 1.96 standard errors of two proportions.
    """
    out = Table(title="runs side by side; ~ is within the noise of the best")
    for heading in ("run", "data", "epochs", "seed", "k-NN", "linear", "k-NN last", "linear last", "rank last"):
        out.add_column(heading, justify="left" if heading in ("run", "data") else "right")
    columns = [("levels", "knn"), ("levels", "linear"), ("last", "knn"), ("last", "linear")]
    best = {c: max((s for s in (_score(r, *c) for r in reports) if s), default=None, key=lambda s: s["accuracy"])
            for c in columns}
    for r in reports:
        cells = [_marked(_score(r, *c), best[c], r["dataset"]["test"]) for c in columns]
        out.add_row(r["run"], r["dataset"]["name"], str(r["epochs"]), str(r["seed"]), *cells,
                    f"{r['rows']['trained']['last']['effective_rank']:.0f}")
    out.add_section()
    for name, group in _by_preset(reports).items():
        cells = [_pooled([_score(r, *c) for r in group]) for c in columns]
        out.add_row(name, group[0]["dataset"]["name"], str(group[0]["epochs"]), f"{len(group)} seeds", *cells, "")
    return out


def _score(report: Report, level: str, protocol: str) -> Report | None:
    rows = report["rows"]["trained"]
    return rows.get(level, rows["last"]).get(protocol)


def _marked(score: Report | None, best: Report | None, n: int) -> str:
    if score is None or best is None:
        return "-"
    p, q = score["accuracy"], best["accuracy"]
    noise = 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return f"{100 * p:.1f}{' best' if score is best else ' ~' if q - p < noise else ''}"


def _by_preset(reports: list[Report]) -> dict[str, list[Report]]:
    groups: dict[str, list[Report]] = {}
    for r in reports:
        groups.setdefault(f"{r['preset']} on {r['dataset']['name']}", []).append(r)
    return {name: group for name, group in groups.items() if len({r["seed"] for r in group}) > 1}


def _pooled(scores: list[Report | None]) -> str:
    values = [100 * s["accuracy"] for s in scores if s]
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else "-"
