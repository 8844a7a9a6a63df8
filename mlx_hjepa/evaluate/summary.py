"""Reports as people read them: a table for the terminal, report.md, and several runs side by side."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from scipy.special import stdtrit

from mlx_hjepa.run import Run, write_atomically

Report = dict[str, Any]
TUNED = (("fine_tune", "fine-tuned"), ("scratch", "from scratch"))


def table(report: Report) -> Table:
    """Every subject and level of one report."""
    data = report["dataset"]
    title = f"{report['run']}: {data['name']}, {data['test']:,} test pictures, {report['encoder']} encoder"
    out = Table(title=", ".join([title, *_notes(data)]))
    headings = ("features", "level", "k-NN, k 20", "linear probe", "effective rank")
    for heading in headings:
        out.add_column(heading, justify="left" if heading in headings[:2] else "right", overflow="fold")
    for name, levels in report["rows"].items():
        for level, scores in levels.items():
            out.add_row(*_cells(name, level, scores))
        out.add_section()
    for name, label in TUNED:
        if name in report:
            out.add_row(label, _length(report[name]), "", percent(report[name]), "")
    return out


def findings(report: Report) -> list[str]:
    """What `table` has no column for, in lines: the verdict, the augmented probe, few labels."""
    lines = [f"features: {report['verdict']} ({report['reason']})"] if "verdict" in report else []
    lines += _augmented(report)
    for title, rows in _few_shot(report).items():
        lines += [f"{title}, {name}, {level}: {text}" for name, level, text in rows]
    return lines


def _length(tuned: Report) -> str:
    """What of its settings fine-tuning is told by: its epochs, and the pixels a side where they are not the run's."""
    return f"{tuned['epochs']} epochs{_size(tuned)}"


def _scored_as(tuned: Report) -> str:
    """What fine-tuning of two runs must share to be compared."""
    rate = tuned.get("settings", {}).get("lr")
    return f"{tuned['epochs']} epochs{f', rate {rate:g}' if rate else ''}{_size(tuned)}"


def _size(tuned: Report) -> str:
    size = tuned.get("settings", {}).get("size")
    return f", {size} px" if size else ""


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
    preset = f" of the configuration {report['preset']}" if report["preset"] != report["run"] else ""
    text = [f"# {report['run']}", "",
            f"{data['name']}, {data['test']:,} test pictures, bank of {data['train']:,}; frozen {report['encoder']} "
            f"encoder{preset}, {report['views']}, {report['epochs']} epochs, seed {report['seed']}. ± is half of "
            "Wilson's 95 % interval.", ""]
    text += [line for note in _notes(data) for line in (f"{note}.", "")]
    if "verdict" in report:
        text += [f"**Features: {report['verdict']}** ({report['reason']}).", ""]
    text += _grid(["features", "level", "k-NN k 20, T 0.07", "linear probe", "effective rank", "k-NN top-5",
                   "linear top-5"],
                  [_cells(name, level, scores) + [_top5(scores.get(p)) for p in ("knn", "linear")]
                   for name, levels in report["rows"].items() for level, scores in levels.items()])
    for name, label in (("fine_tune", "Fine-tuned"), ("scratch", "The same network from scratch")):
        if name in report:
            f = report[name]
            text += [f"{label}: {percent(f)} after epoch {f['epoch']} of {f['epochs']}{_size(f)}, chosen on "
                     f"{f['held_out']:,} held-out pictures, trained on {f['trained_on']:,}.", ""]
    text += [line for found in _augmented(report) for line in (f"{found}.", "")] + _sweep(report)
    for title, rows in _few_shot(report).items():
        text += [f"## {title}", "", *_grid(["features", "level", "accuracy, 95 % interval"], rows)]
    text += _quality(report) + _pictures(run, report)
    text += ["## Where this comes from", "", *_grid(["protocol", "seconds", "device", "commit", "command"], [
        [name, f"{how['seconds']:.0f}", how["device"], how["commit"] or "not known", f"`{how['command']}`"]
        for name, how in report["protocols"].items()])]
    facts = ("checkpoint", "weights", "pictures_seen", "train_seconds")
    text += [f"- {key}: {report[key]}" for key in facts if key in report]
    text += ["- versions: " + ", ".join(f"{name} {version or '-'}" for name, version in report["versions"].items())]
    return "\n".join([*text, f"- evaluation took {report['seconds']:.0f} s"]) + "\n"


def _top5(score: Report | None) -> str:
    return f"{100 * score['top5']:.1f}" if score else "-"


def _notes(data: Report) -> list[str]:
    """What a reader of the numbers must know of the pictures."""
    subset = f"a subset: at most {data['subset']:,} pictures of each split" if data["subset"] else None
    leaked = f"{data['leaked']:,} test pictures lie in the bank too, byte for byte" if data["leaked"] else None
    split = data["test_split"] if data["test_split"] != "test" else None
    return [note for note in (data["note"], subset, split, leaked) if note]


def _grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [" | ".join(headings), " | ".join("---" for _ in headings), *(" | ".join(row) for row in rows)]
    return [*(f"| {line} |" for line in lines), ""]


def _sweep(report: Report) -> list[str]:
    rows = []
    for name, levels in report["rows"].items():
        for level in ("last", "levels"):
            sweep = levels.get(level, {}).get("knn", {}).get("sweep", [])
            if sweep:
                found = {(s["k"], s["T"]): s["accuracy"] for s in sweep}
                wanted = [(k, 0.07) for k in (1, 5, 10, 20, 50, 100, 200)] + [(200, 0.1)]
                k, t = best = max(found, key=lambda pair: found[pair])
                rows.append([name, level, *(f"{100 * found[w]:.1f}" if w in found else "-" for w in wanted),
                             percent(levels[level]["knn"].get("whitened")),
                             f"{100 * found[best]:.1f} at k {k}, T {t:g}"])
    heads = ["features", "level", *(f"k {k}" for k in (1, 5, 10, 20, 50, 100, 200)), "k 200, T 0.1 (lightly)",
             "k 20, whitened", "best of all k and T, by the test pictures"]
    return ["## k-NN, T 0.07", "", *_grid(heads, rows)] if rows else []


def _augmented(report: Report) -> list[str]:
    return [f"Linear probe on fresh crops in every epoch, {name}, {level}: {percent(scores['linear_augmented'])}"
            for name, levels in report["rows"].items() for level, scores in levels.items()
            if "linear_augmented" in scores]


def _pictures(run: Run, report: Report) -> list[str]:
    files = [f"{report['name']}-{part}.png" for part in ("knn", "levels", "confusion", "spectrum")]
    return [line for file in files if (run.scored / file).is_file() for line in (f"![{file}]({file})", "")]


def _few_shot(report: Report) -> dict[str, list[list[str]]]:
    """Rows of features, level and accuracies, by title."""
    found: dict[str, list[list[str]]] = {}
    for kind, title in (("episodes", "Few-shot episodes, nearest centroid"), ("labels", "k labels a class")):
        for name, levels in report["rows"].items():
            for level, scores in levels.items():
                if kind in scores.get("few_shot", {}):
                    found.setdefault(title, []).append([name, level, _few(scores["few_shot"][kind])])
    return found


def _few(found: Report) -> str:
    """What ran, then why the rest did not."""
    parts = [f"{k}-shot {_spread(s)}" for k, s in found.get("shots", {}).items()]
    parts += [f"{k}: centroid {_spread(s['centroid'])}, logistic {_spread(s['logistic'])}"
              for k, s in found.get("per_class", {}).items()]
    skipped = found.get("skipped", {})
    return "; ".join([*parts, *([skipped] if isinstance(skipped, str) else (f"{k}: {w}" for k, w in skipped.items()))])


def _spread(score: Report) -> str:
    return f"{100 * score['accuracy']:.1f} ± {50 * (score['interval'][1] - score['interval'][0]):.1f} %"


def _quality(report: Report) -> list[str]:
    if "quality" not in report:
        return []
    keys = ("effective_rank", "rankme", "alpha_req", "normalised_std", "uniformity")
    rows = [[name, level, *("-" if values[k] is None else f"{values[k]:.3g}" for k in keys),
             "{mean:.2f} ({p5:.2f} to {p95:.2f})".format(**values["cosine"]),
             found["verdict"] if level == "last" else "-"]
            for name, found in report["quality"].items() for level, values in found["by_level"].items()]
    text = ["## Feature quality", "", *_grid(["features", "level", "effective rank", "RankMe", "alpha-ReQ",
                                              "normalised std", "uniformity", "cosine of two, mean (5 to 95 %)",
                                              "verdict"], rows)]
    for name, found in report["quality"].items():
        if found["views"]:
            v = found["views"]
            text += [f"{name}: LiDAR {v['lidar']:.1f} and alignment {v['alignment']:.3f} over {v['pictures']:,} "
                     f"pictures x {v['views']} views.", ""]
    return text


def write(run: Run, report: Report) -> None:
    """The pictures, and report.md with them, beside report.json."""
    from mlx_hjepa.plots.evaluation import draw

    draw(report, run.scored, report["name"])
    write_atomically(run.scored / f"{report['name']}.md", markdown(run, report))


def compare(reports: list[Report]) -> dict[str, Any]:
    """Several runs side by side; runs that differ in their seed alone pooled too, one value a seed.

    columns; runs, with the accuracy of each column; seeds, with mean and std over the seeds. A score's mark is "best"
    or "~", within the noise of the best on the same pictures: for runs a difference under the root of the two half 95 %
    intervals' squares, for pooled seeds one under Student's 95 % point of the two means (Welch); "" too where there is
    no other to compare with. Each number of epochs, rate and size of fine-tuning or from scratch has its own column.
    """
    tunings = [(name, label, how) for name, label in TUNED
               for _, how in sorted({(r[name]["epochs"], _scored_as(r[name])) for r in reports if name in r})]
    found = [_headline(r, tunings) for r in reports]
    columns = [column for column in found[0] if any(scores[column] for scores in found)]
    runs: list[dict[str, Any]] = []
    groups: dict[tuple, dict[int, tuple[Report, Report]]] = {}
    for r, scores in zip(reports, found, strict=True):
        rivals = [other for o, other in zip(reports, found, strict=True) if _pictures_of(o) == _pictures_of(r)]
        runs.append({"run": r["run"], "data": r["dataset"]["name"], "epochs": r["epochs"], "seed": r["seed"],
                     "effective_rank": r["rows"]["trained"]["last"]["effective_rank"],
                     "scores": {c: _marked(scores[c], [rival[c] for rival in rivals]) for c in columns}})
        groups.setdefault((r["recipe"], _pictures_of(r)), {})[r["seed"]] = r, scores
    pooled = {key: list(group.values()) for key, group in groups.items() if len(group) > 1}
    seeds = []
    for (_, pictures), group in pooled.items():
        others = [g for (_, p), g in pooled.items() if p == pictures]
        first = group[0][0]
        seeds.append({"preset": first["preset"], "data": first["dataset"]["name"], "epochs": first["epochs"],
                      "seeds": sorted(r["seed"] for r, _ in group),
                      "scores": {c: _pooled(_values(group, c), [_values(g, c) for g in others]) for c in columns}})
    return {"columns": columns, "runs": runs, "seeds": seeds}


def comparison(compared: dict[str, Any]) -> Table:
    """What `compare` found, as a table."""
    out = Table(title="runs side by side; ~ is within the noise of the best")
    for heading in ("run", "data", "epochs", "seed", *compared["columns"], "rank last"):
        out.add_column(heading.replace(", ", "\n"), justify="left" if heading in ("run", "data") else "right",
                       overflow="fold")
    for r in compared["runs"]:
        out.add_row(r["run"], r["data"], str(r["epochs"]), str(r["seed"]), *map(_cell, r["scores"].values()),
                    f"{r['effective_rank']:.0f}")
    out.add_section()
    for s in compared["seeds"]:
        out.add_row(s["preset"], s["data"], str(s["epochs"]), f"{len(s['seeds'])} seeds",
                    *map(_cell, s["scores"].values()), "")
    return out


def _cell(score: Report | None) -> str:
    if score is None:
        return "-"
    spread = f" ± {100 * score['std']:.1f}" if "std" in score else ""
    return f"{100 * score['accuracy']:.1f}{spread} {score['mark']}".rstrip()


def _headline(report: Report, tunings: list[tuple[str, str, str]]) -> dict[str, Report | None]:
    """The scores that runs are compared by, where there are any. tunings: (key of the report, label, `_scored_as`)."""
    last = report["rows"]["trained"]["last"]
    levels = report["rows"]["trained"].get("levels", last)
    shots = levels.get("few_shot", {}).get("episodes", {}).get("shots", {})
    return {"k-NN": levels.get("knn"), "linear": levels.get("linear"), "k-NN last": last.get("knn"),
            "linear last": last.get("linear"), "5-shot": shots.get("5"),
            **{f"{label}, {how}": report[name] if name in report and _scored_as(report[name]) == how else None
               for name, label, how in tunings}}


def _pictures_of(report: Report) -> tuple[str, int]:
    return report["dataset"]["fingerprint"], report["dataset"]["test"]


def _marked(score: Report | None, rivals: list[Report | None]) -> Report | None:
    if score is None:
        return None
    scored = [r for r in rivals if r]
    best = max(scored, key=lambda r: r["accuracy"])
    noise = math.hypot(*((r["interval"][1] - r["interval"][0]) / 2 for r in (score, best)))
    behind = best["accuracy"] - score["accuracy"]
    mark = "" if len(scored) < 2 else "best" if behind == 0 else "~" if behind < noise else ""
    return {"accuracy": score["accuracy"], "mark": mark}


def _values(group: list[tuple[Report, Report]], column: str) -> list[float]:
    return [scores[column]["accuracy"] for _, scores in group if scores[column]]


def _pooled(values: list[float], rivals: list[list[float]]) -> Report | None:
    if len(values) < 2:
        return None
    best = max((r for r in rivals if len(r) > 1), key=mean)
    mark = "" if len(rivals) < 2 else "best" if mean(values) == mean(best) else "~" if _alike(values, best) else ""
    return {"accuracy": mean(values), "std": stdev(values), "mark": mark}


def _alike(a: list[float], b: list[float]) -> bool:
    """No difference of the means at 5 %, by Welch's test."""
    u, v = stdev(a) ** 2 / len(a), stdev(b) ** 2 / len(b)
    if u + v == 0:
        return False
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    return abs(mean(a) - mean(b)) < stdtrit(freedom, 0.975) * math.sqrt(u + v)
