"""Pictures of a report (evaluate.report), from its values alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Report = dict[str, Any]
COLOURS = {"raw": "0.55", "random": "C1", "trained": "C0"}
NAMED = 20  # classes that fit with their names and numbers


def draw(report: Report, folder: Path, name: str) -> None:
    """Write <name>-knn, -levels, -confusion and -spectrum.png into `folder`, each if the report has its numbers; an
    earlier report's picture that it has none for is removed."""
    ran = report["protocols"]
    for make, there in ((knn, "knn" in ran), (levels, "knn" in ran or "linear" in ran), (confusion, "linear" in ran),
                        (spectrum, "quality" in ran)):
        file = folder / f"{name}-{make.__name__}.png"
        file.unlink(missing_ok=True)
        if there:
            figure = make(report)
            figure.suptitle(f"{report['run']}: {report['dataset']['name']}, {report['encoder']} encoder")
            figure.savefig(file, dpi=100)
            plt.close(figure)


def _whole(report: Report, subject: str) -> tuple[str, Report]:
    """The label and scores of a subject's `levels`, or of `last` where it has one level."""
    rows = report["rows"][subject]
    level = "levels" if "levels" in rows else "last"
    return subject if subject == "raw" else f"{subject}, {level}", rows[level]


def knn(report: Report) -> plt.Figure:
    """Accuracy against k at T 0.07: raw pixels, the untrained encoder and the trained one."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for subject, colour in COLOURS.items():
        label, scores = _whole(report, subject)
        ks, accuracy = zip(*((int(k), 100 * a) for k, a in scores["knn"]["by_k"].items()), strict=True)
        axis.plot(ks, accuracy, marker="o", ms=4, color=colour, label=label)
    axis.set_xscale("log")  # first, for it sets ticks of its own
    axis.set(xlabel="neighbours k (cosine, T 0.07)", ylabel="k-NN accuracy, %", xticks=ks, xticklabels=ks)
    axis.minorticks_off()
    axis.legend()
    return figure


def levels(report: Report) -> plt.Figure:
    """Trained features by depth with Wilson's interval; the untrained encoder and raw pixels as lines across."""
    rows = report["rows"]["trained"]
    protocols = [p for p in (("knn", "k-NN", "C0"), ("linear", "linear probe", "C3")) if p[0] in report["protocols"]]
    depths = sorted(filter(str.isdigit, rows), key=int)
    order = [*depths, *(level for level in ("last", "levels", "last4") if level in rows)]
    figure, axis = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for key, name, colour in protocols:
        accuracy = np.array([100 * rows[level][key]["accuracy"] for level in order])
        ends = 100 * np.array([rows[level][key]["interval"] for level in order]).T
        axis.errorbar(range(len(order)), accuracy, np.abs(ends - accuracy), fmt="o", color=colour, capsize=3,
                      label=f"{name}, trained")
        axis.plot(accuracy[: len(depths) + 1], color=colour)  # joined: the single depths
        for subject, style in (("random", "--"), ("raw", ":")):
            label, scores = _whole(report, subject)
            axis.axhline(100 * scores[key]["accuracy"], ls=style, color=colour, alpha=0.7, label=f"{name}, {label}")
    axis.set(xlim=(-0.5, len(order) - 0.5), ylabel="accuracy, %", xticks=range(len(order)),
             xticklabels=[f"depth {level}" if level in depths else level for level in order])
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def confusion(report: Report) -> plt.Figure:
    """The linear probe's mistakes, rows the truth in per cent of its class; each class's accuracy beside it."""
    (label, scores), classes = _whole(report, "trained"), report["classes"]
    counts = np.array(scores["linear"]["confusion"], float)
    shares, places = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), range(len(classes))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 6), sharey=True, width_ratios=(3, 1), layout="constrained")
    left.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    right.barh(places, np.diag(shares))
    if len(classes) <= NAMED:
        left.set_xticks(places, classes, rotation=45 if max(map(len, classes)) > 3 else 0)
        left.set_yticks(places, classes)
        _numbers(left, np.rint(shares), "{:.0f}", shares > 50)
    left.set(xlabel="predicted", ylabel="class", title=f"linear probe, {label}: per cent of a class's test pictures")
    right.set(xlim=(0, 100), xlabel="accuracy, %", title="by class")
    return figure


def spectrum(report: Report) -> plt.Figure:
    """Singular values of `last`, untrained and trained; linear CKA between depths where there are several."""
    found = report["quality"]
    similar = {subject: values["cka"] for subject, values in found.items() if values["cka"]}
    figure, axes = plt.subplots(1, 1 + len(similar), figsize=(6 + 3.4 * len(similar), 4), squeeze=False,
                                width_ratios=(1.6, *(1 for _ in similar)), layout="constrained")
    for subject, values in found.items():
        last = values["by_level"]["last"]
        sigma = [s for s in last["spectrum"] if s > 1e-6]  # LayerNorm takes one dimension
        axes[0, 0].semilogy(range(1, len(sigma) + 1), sigma, color=COLOURS[subject],
                            label=f"{subject}: effective rank {last['effective_rank']:.1f}")
    axes[0, 0].set(xlabel="singular value", ylabel="relative to the first", title="test features, last")
    axes[0, 0].legend()
    for axis, (subject, cka) in zip(axes[0, 1:], similar.items(), strict=True):
        depths, matrix, places = cka["depths"], np.array(cka["matrix"]), range(len(cka["depths"]))
        axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        axis.set(title=f"CKA between depths, {subject}", xlabel="depth", ylabel="depth", xticks=places, yticks=places,
                 xticklabels=depths, yticklabels=depths)
        _numbers(axis, matrix, "{:.2f}", matrix < 0.6)
    return figure


def _numbers(axis: Any, matrix: np.ndarray, form: str, light: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        axis.text(column, row, form.format(value) if value else "", ha="center", va="center", fontsize=8,
                  color="white" if light[row, column] else "black")
