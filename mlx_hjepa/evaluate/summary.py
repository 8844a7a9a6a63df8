"""Reports as people read them: a table for the terminal, report.md, and several runs side by side."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from scipy.special import stdtrit

from mlx_hjepa.evaluate.report import report_name
from mlx_hjepa.run import Run, write_atomically

Report = dict[str, Any]


def table(report: Report) -> Table:
    """Every subject and level of one report."""
    data = report["dataset"]
    title = f"{report['run']}: {data['name']}, {data['test']:,} test pictures, {report['encoder']} encoder"
    out = Table(title=", ".join([title, *_notes(data)]))
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
    text += [line for note in _notes(data) for line in (f"{note}.", "")]
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
    text += _augmented(report) + _sweep(report) + _few_shot(report) + _quality(report) + _pictures(run, report)
    text += ["## Where this comes from", "", *(f"- {key}: {report[key]}" for key in (
        "command", "checkpoint", "weights", "pictures_seen", "train_seconds", "commit", "versions") if key in report),
        f"- device: {report['device']['name']}; evaluation took {report['seconds']:.0f} s"]
    return "\n".join(text) + "\n"


def _notes(data: Report) -> list[str]:
    """What a reader of the numbers must know of the pictures."""
    subset = f"a subset: at most {data['subset']:,} pictures of each split" if data["subset"] else None
    return [note for note in (data["note"], subset, data["test_split"] if data["test_split"] != "test" else None)
            if note]


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


def _augmented(report: Report) -> list[str]:
    found = [f"{name}, {level}: {percent(scores['linear_augmented'])}" for name, levels in report["rows"].items()
             for level, scores in levels.items() if "linear_augmented" in scores]
    return [f"Linear probe on fresh crops in every epoch: {'; '.join(found)}.", ""] if found else []


def _pictures(run: Run, report: Report) -> list[str]:
    files = [f"{report_name(report)}-{part}.png" for part in ("knn", "levels", "confusion", "spectrum")]
    return [line for file in files if (run.evaluation / file).is_file() for line in (f"![{file}]({file})", "")]


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
    draw(report, run.evaluation, name)
    write_atomically(run.evaluation / f"{name}.md", markdown(run, report))


def comparison(reports: list[Report]) -> Table:
    """Several runs side by side. Runs of one preset and different seeds are pooled below as mean and spread.

    A `~` marks what is within the noise of the best on the same pictures: for runs a difference under 1.96 standard
    errors of two proportions, for pooled seeds one under Student's 95 % point of the two means (Welch).
    """
    out = Table(title="runs side by side; ~ is within the noise of the best")
    for heading in ("run", "data", "epochs", "seed", "k-NN", "linear", "k-NN last", "linear last", "rank last"):
        out.add_column(heading, justify="left" if heading in ("run", "data") else "right")
    columns = [("levels", "knn"), ("levels", "linear"), ("last", "knn"), ("last", "linear")]
    scores = [[_score(r, *c) for c in columns] for r in reports]
    for r, row in zip(reports, scores, strict=True):
        rivals = [other for o, other in zip(reports, scores, strict=True) if _pictures_of(o) == _pictures_of(r)]
        cells = [_marked(score, [other[i] for other in rivals], r["dataset"]["test"]) for i, score in enumerate(row)]
        out.add_row(r["run"], r["dataset"]["name"], str(r["epochs"]), str(r["seed"]), *cells,
                    f"{r['rows']['trained']['last']['effective_rank']:.0f}")
    out.add_section()
    groups = _by_preset(reports)
    for (name, _, epochs), group in groups.items():
        others = [g for (_, pictures, _), g in groups.items() if pictures == _pictures_of(group[0])]
        cells = [_pooled(_values(group, *c), [_values(g, *c) for g in others]) for c in columns]
        out.add_row(name, group[0]["dataset"]["name"], str(epochs), f"{len(group)} seeds", *cells, "")
    return out


def _score(report: Report, level: str, protocol: str) -> Report | None:
    rows = report["rows"]["trained"]
    return rows.get(level, rows["last"]).get(protocol)


def _pictures_of(report: Report) -> tuple[str, int]:
    return report["dataset"]["fingerprint"], report["dataset"]["test"]


def _marked(score: Report | None, rivals: list[Report | None], n: int) -> str:
    if score is None:
        return "-"
    p, q = score["accuracy"], max(r["accuracy"] for r in rivals if r)
    noise = 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return f"{100 * p:.1f}{' best' if p == q else ' ~' if q - p < noise else ''}"


def _by_preset(reports: list[Report]) -> dict[tuple[str, tuple[str, int], int], list[Report]]:
    """Reports that differ in their seed alone, by preset, pictures and epochs; those of several seeds."""
    groups: dict[tuple[str, tuple[str, int], int], list[Report]] = {}
    for r in reports:
        groups.setdefault((r["preset"], _pictures_of(r), r["epochs"]), []).append(r)
    return {key: group for key, group in groups.items() if len({r["seed"] for r in group}) > 1}


def _values(group: list[Report], level: str, protocol: str) -> list[float]:
    return [100 * score["accuracy"] for score in (_score(r, level, protocol) for r in group) if score]


def _pooled(values: list[float], rivals: list[list[float]]) -> str:
    if len(values) < 2:
        return "-"
    best = max((r for r in rivals if len(r) > 1), key=mean)
    mark = "" if len(rivals) < 2 else " best" if mean(values) == mean(best) else " ~" if _alike(values, best) else ""
    return f"{mean(values):.1f} ± {stdev(values):.1f}{mark}"


def _alike(a: list[float], b: list[float]) -> bool:
    """No difference of the means at 5 %, by Welch's test."""
    u, v = stdev(a) ** 2 / len(a), stdev(b) ** 2 / len(b)
    if u + v == 0:
        return False
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    return abs(mean(a) - mean(b)) < stdtrit(freedom, 0.975) * math.sqrt(u + v)
