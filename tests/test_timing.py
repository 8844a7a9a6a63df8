"""FLOPs against the graph, fits, projections, budgets, chips, and what the benchmarks write."""

import gc
import itertools
import json
import math
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_hjepa
from mlx_hjepa import config
from mlx_hjepa.analyze import chips, projection, timing
from mlx_hjepa.model import vit
from mlx_hjepa.model.hjepa import HJEPA, key_of, smooth_l1
from mlx_hjepa.run import UserError
from mlx_hjepa.schedule import Schedule
from mlx_hjepa.train import step as step_module
from mlx_hjepa.train.step import Step

ROOT = Path(mlx_hjepa.__file__).resolve().parent.parent
PRESETS = {file.stem: config.load(file) for file in sorted((ROOT / "configs").rglob("*.yaml"))}
KIND = {"kind": "cpu", "threads": 2, "gpu_cores": None}
DESIGN_ROW = {"model", "levels", "batch", "precision", "image_size", "it_s", "img_s", "tflops", "peak_gb", "kernels"}

sys.path.insert(0, str(ROOT / "benchmarks"))
import kernels  # noqa: E402
import throughput  # noqa: E402


def rows_of(a, b, batches, noise=0.0, **more):
    """Rows of a made machine: t = a + b * B, alternately a little slower and faster."""
    return [{"batch": n, "it_s": 1 / ((a + b * n) * (1 + noise * (-1) ** i)), "spread": 0.01, "quick": False,
             "device": "a chip", **more} for i, n in enumerate(batches)]


# ---------------------------------------------------------------- FLOPs


def plain_attention(qkv, heads):
    b, n, width = qkv.shape
    q, k, v = (x.reshape(b, n, heads, -1).transpose(0, 2, 1, 3) for x in mx.split(qkv, 3, axis=-1))
    return (mx.softmax(q @ k.transpose(0, 1, 3, 2), axis=-1) @ v).transpose(0, 2, 1, 3).reshape(b, n, width // 3)


def products(c, monkeypatch):
    """FLOPs of every matrix product in the traced step, by the shapes that MLX exports."""
    monkeypatch.setattr(vit, "gelu", lambda x: x * mx.sigmoid(x))  # custom functions cannot be exported
    monkeypatch.setattr(vit, "_attend", lambda heads: lambda qkv: (plain_attention(qkv, heads),))
    monkeypatch.setattr(step_module, "smooth_l1", lambda a, b: mx.abs(a - b).mean(axis=(0, 1, 3)))
    step = Step(HJEPA(c, (0.5,) * 3, (0.25,) * 3), Schedule(c.training, 10), "fp32")
    images = mx.zeros((c.training.batch, c.data.image_size, c.data.image_size, 3), mx.uint8)
    nodes = []
    mx.export_function(nodes.append, step._step, *step.initial_state().arrays(), images, key_of(0, 0),
                       step.scalars(0, [1.0] * len(c.model.levels)))
    found = [n for n in nodes if n.get("name") in ("Matmul", "AddMM")]
    return sum(2 * math.prod(n["outputs"][0][1]) * n["inputs"][0][1][-1] for n in found)


@pytest.mark.parametrize("change", [
    {}, {"model": {"depth": 3, "levels": [1, 2, 3], "mlp_ratio": 3}, "masking": {"masks_per_image": 2}}])
def test_flops_are_those_of_the_traced_step(tiny_config, monkeypatch, change):
    c = tiny_config(augment={"crop": "none", "flip": False}, **change)
    counted = products(c, monkeypatch) / c.training.batch
    assert timing.flops_per_picture(c).total == pytest.approx(counted, rel=0.003)


def test_flops_follow_the_formula_of_the_design():
    f = timing.flops_per_picture(config.load(ROOT / "tests/data/preset.yaml"))

    def block(n, d):
        return 24 * n * d * d + 4 * n * n * d

    assert f.target == pytest.approx(12 * block(64, 192), rel=0.01)
    assert f.context == pytest.approx(3 * 12 * block(28, 192), rel=0.01)
    assert f.predictor == pytest.approx(3 * 4 * block(56, 192), rel=0.10)  # plus level embeddings and heads
    assert f.total == f.context + f.target + f.predictor


def test_parameters_are_counted(tiny_config):
    for c in (tiny_config(), PRESETS["vit_small_100ep"]):
        encoder, predictor = HJEPA(c, (0.5,) * 3, (0.25,) * 3).init()
        counts = [sum(w.size for w in weights.values()) for weights in (encoder, predictor)]
        assert timing.parameters(c) == (pytest.approx(counts[0], rel=0.06), pytest.approx(counts[1], rel=0.06))


# ---------------------------------------------------------------- fit


def test_a_fit_recovers_a_and_b_and_predicts_a_batch_left_out():
    fit = timing.fit(rows_of(0.004, 0.0002, [8, 32, 128, 512]))
    assert (fit.a, fit.b) == (pytest.approx(0.004, rel=1e-6), pytest.approx(0.0002, rel=1e-6))
    assert fit.step(256)[1] == pytest.approx(0.0552, rel=1e-6)
    noisy = rows_of(0.004, 0.0002, [8, 16, 32, 64, 128, 256, 512], noise=0.03)
    assert all(abs(error) < 0.10 for error in timing.left_out(noisy).values())
    assert set(timing.left_out(noisy)) == {16, 32, 64, 128, 256}
    low, mid, high = timing.fit(noisy).step(64)
    assert low < 0.004 + 0.0002 * 64 < high
    assert mid - low == pytest.approx(high - mid)


def test_a_fit_never_has_a_negative_part():
    fit = timing.fit(rows_of(-0.001, 0.001, [4, 16, 64]))
    assert fit.a == 0
    assert fit.b == pytest.approx(0.001, rel=0.2)
    flat = timing.fit(rows_of(0.01, -0.00001, [4, 16, 64]))
    assert (flat.a, flat.b) == (pytest.approx(0.01, rel=0.1), 0)


@pytest.mark.parametrize("overlap", [2, 3, 4])
def test_a_fit_finds_how_far_launches_hide_behind_the_work(overlap):
    made = timing.Fit(0.016, 0.00004, 0.0, overlap=overlap)
    rows = [r | {"it_s": 1 / made.step(r["batch"])[1]} for r in rows_of(0, 1, [32, 64, 128, 256, 512, 1024])]
    found = timing.fit(rows)
    assert (found.a, found.b) == (pytest.approx(made.a), pytest.approx(made.b))
    assert found.overlap == overlap
    assert found.interval < 0.05
    assert max(map(abs, timing.left_out(rows).values())) < 1e-6
    assert timing.fit(rows[:2]).overlap == 1


def test_a_rows_peak_memory_is_its_own(tiny_config):
    small = tiny_config()
    own = timing.measure(small, Step, 2, 0.0)["peak_gb"]
    gc.disable()  # or chance decides when the large step goes
    try:
        timing.measure(tiny_config(model={"dim": 512, "head_dim": 64}), Step, 2, 0.0)
        after = timing.measure(small, Step, 2, 0.0)["peak_gb"]
    finally:
        gc.enable()
    assert after < 1.3 * own


def test_two_measurements_of_a_point_are_one_row():
    row, again = ({"it_s": v, "img_s": 8 * v, "tflops": v / 10, "matrix_share": v / 100, "spread": 0.02,
                   "peak_gb": 1 / v,
                   "steps": 15, "first_step_s": 3 / v, "batch": 8} for v in (10.0, 5.0))
    both = timing.together(row, again)
    assert both["it_s"] == pytest.approx(1 / 0.15)  # the mean of 0.1 s and 0.2 s
    assert [both[k] / both["it_s"] for k in ("img_s", "tflops", "matrix_share")] == pytest.approx([8, 0.1, 0.01])
    assert both["spread"] == pytest.approx(1 / 3)
    assert (both["peak_gb"], both["steps"], both["first_step_s"], both["batch"]) == (0.2, 30, 0.3, 8)


def test_the_interval_grows_with_the_noise_and_with_too_few_points():
    quiet, loud = (timing.fit(rows_of(0.004, 0.0002, [8, 32, 128, 512], noise)).interval for noise in (0.0, 0.1))
    assert 0.03 <= quiet < 0.05 < loud
    assert timing.fit(rows_of(0.004, 0.0002, [8, 32])).interval >= 0.10
    with pytest.raises(UserError, match="two batch sizes"):
        timing.fit(rows_of(0.004, 0.0002, [8, 8]))


def test_a_measurement_is_found_by_its_model_alone(tmp_path, tiny_config):
    c, file = tiny_config(), tmp_path / "machine.json"
    assert timing.measured(c, file) is None
    entry = timing.key(c)
    costs = timing.Costs(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    rows = rows_of(0.01, 0.001, [4, 8, 16], **entry)
    file.write_text(json.dumps({"rows": rows, "fits": [{**entry, "costs": costs._asdict()}]}))
    found = timing.measured(c, file)
    assert (found.a, found.b) == (pytest.approx(0.01), pytest.approx(0.001))
    assert found.costs == costs
    assert found.basis == "the fit of benchmarks/throughput.py on a chip, batch 4, 8, 16"
    for other in ({"model": {"levels": [2]}}, {"training": {"precision": "bf16"}}, {"masking": {"context_tokens": 8}}):
        assert timing.measured(tiny_config(**other), file) is None
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        timing.measured(c, file)
    older = [{k: v for k, v in row.items() if k != "quick"} for row in rows]
    file.write_text(json.dumps({"device": {**KIND, "name": "a chip"}, "rows": older, "fits": [{**entry, "costs": {}}]}))
    assert timing.measured(c, file) is None


# ---------------------------------------------------------------- projections and budgets


def speed(a, b, interval=0.1, costs=timing.UNKNOWN):
    return timing.Fit(a, b, interval, costs)


def test_a_projection_adds_up(tiny_config):
    c = tiny_config(data={"dataset": "cifar10", "image_size": 32}, training={"batch": 500, "epochs": 10},
                    logging={"health_every": 2, "knn_every": 5}, checkpoints={"every_epochs": 4, "every_minutes": 1e6})
    # 5,000 held out, 10,000 in the bank; a health check is 5000 * (0.0002 + 0.0001) + 0.5 s, a probe 3 + 2 s
    costs = timing.Costs(first_step=30, encode=2e-4, check=0.5, feature_statistics=1e-4, knn_search=4e-8, checkpoint=1)
    p = timing.project(c, speed(0.1, 0.0002, costs=costs))
    assert p.steps == 1_000
    # health at 0, 2, 4, 6, 8, 10; k-NN at 5, 10; checkpoints at 4, 5, 8, 10
    assert p.parts == pytest.approx({"training": 200, "first_step": 30, "health": 12, "knn": 10, "checkpoint": 4})
    assert p.mid == pytest.approx(256)
    assert (p.low, p.high) == (pytest.approx(0.9 * 256), pytest.approx(1.1 * 256))
    assert (p.estimated, p.not_counted) == ([], [])
    assert timing.project(c, speed(0.1, 0.0002), epochs=20).parts["training"] == pytest.approx(400)
    assert timing.project(c, speed(0.1, 0.0002), pictures=5_000).steps == 100


def test_a_projection_without_measured_costs_still_counts_evaluation():
    p = timing.project(PRESETS["vit_tiny_20ep"], speed(0.0, 0.001))
    assert p.parts["health"] > 0
    assert p.parts["knn"] > 0
    assert p.parts["checkpoint"] > 0
    assert p.parts["training"] == pytest.approx(20 * 195 * 0.256)
    assert p.mid < 1.3 * p.parts["training"]
    assert p.estimated == ["health", "knn", "checkpoint"]
    assert p.not_counted == ["first_step", "feature_statistics", "knn_search"]
    some = timing.project(PRESETS["vit_tiny_20ep"], speed(0.0, 0.001, costs=timing.Costs(first_step=9.0)))
    assert (some.parts["first_step"], some.not_counted) == (9.0, p.not_counted[1:])


def test_costs_scale_with_the_pictures(tiny_config):
    costs = timing.Costs(0, encode=1e-3, check=0, feature_statistics=0, knn_search=1e-8, checkpoint=0)
    digits, cifar = (timing.project(tiny_config(data={"dataset": name, "image_size": 16}), speed(0.1, 0, costs=costs))
                     for name in ("digits", "cifar10"))
    assert digits.parts["health"] / cifar.parts["health"] == pytest.approx(143 / 5_000)
    assert digits.parts["knn"] / cifar.parts["knn"] == pytest.approx(
        (1_437e-3 + 143 * 1_294e-8) / (15 + 5_000 * 10_000e-8))


def test_unlabelled_folders_are_not_probed(tiny_config, tmp_path):
    costs = timing.Costs(0, encode=1.0, check=0, feature_statistics=0, knn_search=0, checkpoint=0)

    def probes(root):
        c = tiny_config(data={"dataset": "folder", "root": str(root)})
        return timing.project(c, speed(0.1, 0, costs=costs), pictures=1_000).parts["knn"]

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.jpg").touch()
    assert probes(tmp_path) == 0
    (tmp_path / "train" / "cats").mkdir()
    assert probes(tmp_path) > 0
    assert probes(tmp_path / "not here") > 0


def test_a_projection_says_what_it_lacks(tiny_config, tmp_path):
    folder = tiny_config(data={"dataset": "folder", "root": str(tmp_path)})
    with pytest.raises(UserError, match="number of its training pictures"):
        timing.project(folder, speed(0.1, 0.001))
    assert timing.project(folder, speed(0.1, 0.001), pictures=40).steps == 20
    with pytest.raises(UserError, match="larger than the 3"):
        timing.project(folder, speed(0.1, 0.001), pictures=3)


def test_a_budget_gives_presets_batches_and_epochs_that_fit():
    native = {name: PRESETS[name] for name in ("vit_tiny_20ep", "vit_wide_20ep", "vit_small_100ep")}

    def rate(c):
        return speed(0.01, 1e-12 * timing.flops_per_picture(c).total)

    options = projection.fits(10_000, native, rate)
    assert options
    for option in options:
        sized = timing.with_batch(native[option.preset], option.batch)
        assert option.projection.high <= 10_000 < timing.project(sized, rate(sized), option.epochs + 1).high
        assert option.complete == (option.epochs >= native[option.preset].training.epochs)
    first = options[0]
    assert (first.preset, first.batch, first.complete) == ("vit_wide_20ep", 128, True)
    assert first.command(("data.root=a b",)) == (
        f"mlx-hjepa train vit_wide_20ep --set 'data.root=a b' --set training.batch=128 "
        f"--set training.epochs={first.epochs}")
    assert not any(o.complete for o in options if o.preset == "vit_small_100ep")
    assert projection.fits(1, native, rate) == []
    assert {o.epochs for o in projection.fits(1e9, native, rate, most=150)} == {150}


# ---------------------------------------------------------------- chips


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda c: f"{c.name} {c.cores}")
def test_every_preset_gets_a_band_that_says_it_is_a_projection(chip):
    for c in PRESETS.values():
        band = chips.band(c, chip, c.training.batch)
        assert 0 < band.low < band.mid < band.high < 100
        assert band.label.startswith("projection for M")
    for figure in (chip.peak, chip.memory, *chip.matrix.values(), *filter(None, [chip.reduction])):
        assert figure.value > 0
        assert figure.source
        assert figure.mark in ("computed", "published") or re.match(r"measured|scaled from \d+ GPU cores", figure.mark)
    assert "fp32" not in chip.matrix or chip.matrix["fp32"].value < 0.86 * chip.peak.value


@pytest.mark.parametrize(("chip", "precision", "rate", "mark"), [
    ("M1 Max", "auto", 7.24, "fp32, a roofline; matrix rate: measured;"),
    ("M1 Max 24", "auto", 5.43, "fp32, a roofline; matrix rate: scaled from 32 GPU cores;"),
    ("M2", "fp16", 1.89, "fp16, a roofline; matrix rate: measured, in fp32;"),
    ("M3 Max", "auto", 8.95, "bf16, a roofline; matrix rate: measured, in fp32;"),
    ("M3 Max", "fp32", 8.95, "fp32, a roofline; matrix rate: measured;"),
    ("M3 Ultra", "bf16", 18.9, "bf16, a roofline; matrix rate: measured;"),
    ("M3 Ultra 60", "fp32", 16.2, "matrix rate: measured;"),
    ("M4 Pro 16", "fp32", 5.25, "matrix rate: measured;"),
    ("M5", "auto", 6.5, "bf16, a roofline; matrix rate: measured;"),
    ("M5", "fp32", 0.68 * 3.76, "fp32, a roofline; matrix rate: not measured, from the peak;"),
    ("M5 Max", "bf16", 0.68 * 16.2, "matrix rate: not measured, from the peak;")])
def test_a_band_says_what_its_matrix_rate_is(chip, precision, rate, mark):
    c = config.load(ROOT / "configs/vit_small_100ep.yaml", [f"training.precision={precision}"])
    band = chips.band(c, chips.find(chip), 256)
    assert mark in band.label
    assert band.label.endswith("share of it that training reaches: assumed; first step: a guess")
    share = math.sqrt(7) / 7.24  # at width 384
    assert timing.flops_per_picture(c).total * 256 / band.mid / 1e12 == pytest.approx(rate * share, rel=0.01)


def test_half_precision_moves_half_the_bytes():
    c = PRESETS["vit_tiny_20ep"]
    assert chips.traffic(c, 2) == chips.traffic(c) / 2


def test_an_m1_max_is_calibrated():
    chip = chips.find("Apple M1 Max")
    assert (chip.cores, chip.memory.value) == (32, 400)
    assert chip.peak.value == pytest.approx(10.6, rel=0.01)
    for name in ("vit_tiny_20ep", "vit_small_100ep"):
        c = PRESETS[name]
        low, mid, high, _ = chips.band(c, chip, 256)
        rates = [timing.flops_per_picture(c).total * 256 / t / 1e12 for t in (high, mid, low)]
        assert rates == [pytest.approx(2.0), pytest.approx(math.sqrt(7)), pytest.approx(3.5)]
    small = chips.band(PRESETS["digits_demo"], chip, 8)
    floor = [seconds * chips.kernels(PRESETS["digits_demo"]) for seconds in (3e-6, 5e-6, 10e-6)]
    assert [small.low, small.mid, small.high] == pytest.approx(floor)  # launches decide


@pytest.mark.parametrize("name", ["vit_small_100ep", "vit_wide_20ep", "digits_demo", "m1_max_full_100epoch"])
def test_a_step_has_about_as_many_kernels_as_the_bands_assume(name):
    names, copies = kernels.graph(timing.with_batch(PRESETS[name], 4))
    assert chips.kernels(PRESETS[name]) == pytest.approx(len(names) + copies, rel=0.04)


def test_chips_are_found_by_name():
    assert chips.find("m4 max").cores == 40
    with pytest.raises(UserError, match=r"Did you mean M1 Max\?"):
        chips.find("M1 Macs")
    with pytest.raises(UserError, match="32 or 24 GPU cores"):
        chips.find("M1 Max 30")
    c = PRESETS["vit_small_100ep"]
    hours = timing.project(c, chips.Projected(c, chips.find("M1 Max")))
    assert 5 < hours.low / 3600 < hours.high / 3600 < 12
    assert hours.parts["first_step"] == chips.FIRST_STEP


# ---------------------------------------------------------------- benchmarks


def test_a_sweep_writes_rows_of_the_published_format(tiny_config, tmp_path, monkeypatch):
    measure = timing.measure

    def until_8(c, *args, **kwargs):
        if c.training.batch == 8:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return measure(c, *args, **kwargs)

    monkeypatch.setattr(timing, "measure", until_8)
    document = timing.document({**KIND, "name": "a chip", "commit": "0123456789", "dirty": True})
    document["matrix_tflops"]["fp32"] = 0.1
    c, kept = tiny_config(), []
    throughput.sweep([c], [2, 4, 8, 16], {"steps": 3, "seconds": 0.0, "window": 1}, True, document,
                     lambda: kept.append(1), lambda _: None)
    assert kept == [1]
    assert [row["batch"] for row in document["rows"]] == [2, 4]
    assert [row["batch"] for row in document["out_of_memory"]] == [8]
    for row in document["rows"]:
        assert row.keys() >= DESIGN_ROW
        assert row["img_s"] == pytest.approx(row["it_s"] * row["batch"])
        assert row["tflops"] == pytest.approx(timing.flops_per_picture(c).total * row["img_s"] / 1e12)
        assert row["matrix_share"] == pytest.approx(row["tflops"] / 0.1)
        assert row["steps"] >= 3
        assert (row["device"], row["commit"], row["quick"]) == ("a chip", "0123456+", True)
    (fit,) = document["fits"]
    assert all(cost > 0 for cost in fit["costs"].values())
    old = timing.rounded({**document, "sustained": {"minutes": 10}})
    assert [table.row_count for table in throughput.tables(old)] == [2, 1]
    more = {**document["rows"][0], "batch": 1, "it_s": 2 * document["rows"][0]["it_s"], "quick": False}
    merged = timing.merged(old, {**document, "rows": [more], "out_of_memory": []})
    assert [(row["batch"], row["quick"]) for row in merged["rows"]] == [(1, False), (2, True), (4, True)]
    assert merged["sustained"] == {"minutes": 10}
    (whole,) = merged["fits"]
    assert whole["costs"] == fit["costs"]
    assert (whole["b"], list(whole["left_out"])) == (pytest.approx(timing.fit(merged["rows"]).b), [2])


def test_other_errors_end_the_sweep(tiny_config, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(timing, "measure", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        throughput.sweep([tiny_config()], [2], {}, False, {
            **timing.document({**KIND, "name": "a chip", "commit": None, "dirty": None}), "matrix_tflops": {"fp32": 1}},
            print, print)


def test_models_are_written_as_words():
    c = throughput.model_config("192x12:4,8,12/2", "bf16", 224)
    assert (c.model.dim, c.model.depth, c.model.patch, timing.key(c)["levels"]) == (192, 12, 16, "4,8,12/2")
    assert (c.masking.target_tokens, c.masking.context_tokens) == (76, 76)
    assert timing.key(throughput.model_config("vit_wide"))["levels"] == "2,4,6"
    four = throughput.model_config("64x4:2,4*4")
    assert (four.masking.masks_per_image, timing.key(four)["levels"]) == (4, "2,4*4")
    eight = throughput.model_config("64x4:2,4*8/20/16").masking
    assert (eight.masks_per_image, eight.context_tokens, eight.target_tokens) == (8, 20, 16)
    for wrong in ("192", "vit_huge", "192x12:a", "192x12:4,8"):
        with pytest.raises(config.ConfigError):
            throughput.model_config(wrong)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_native_cifar_preset_is_projected_from_the_default_sweep(file):
    c = config.load(file)
    swept = [throughput.model_config(model) for model in throughput.MODELS["gpu"].split()]
    assert c.data.dataset == "digits" or any(timing.same(timing.key(c), timing.key(s)) for s in swept)
    batches = throughput.whole_numbers(throughput.BATCHES["gpu"])
    assert c.data.dataset == "digits" or min(batches) <= c.training.batch <= max(batches)  # the fit has the rest


def test_kernels_are_nodes_that_are_no_views(tiny_config):
    norm = mx.fast.layer_norm
    names, copies = kernels.graph(tiny_config())
    assert mx.fast.layer_norm is norm
    assert {"Split", "Slice", "Reshape", "Transpose", "Squeeze", "Broadcast", "CustomTransforms"}.isdisjoint(names)
    # 2 + 2 encoder blocks and 1 predictor block: qkv, proj, fc1, fc2 forward; twice backward in the trained three
    assert sum(name in ("Matmul", "AddMM") for name in names) >= 5 * 4 + 3 * 8
    assert "Rsqrt" not in names  # norms are one kernel
    assert copies > 40  # a gradient for each weight
    deeper = kernels.graph(tiny_config(model={"depth": 3, "levels": [1, 3]}))
    assert 20 < len(deeper[0]) - len(names) < 100


def test_cuda_graphs_are_counted_without_child_and_empty_nodes():
    text = '''digraph dot {
subgraph cluster_1 {
"graph_1_node_0"[style="solid" shape="rectangle" label="0
graph_2
"];
"graph_1_node_1"[style="bold" shape="octagon" label="1
_Z5saxpyifPfS_
"];
"graph_1_node_2"[style="solid" shape="rectangle" label="2
EMPTY
"];
"graph_1_node_0" -> "graph_1_node_1";
}
subgraph cluster_2 {
"graph_2_node_0"[style="bold" shape="octagon" label="0
graph_reduce
"];
}
}'''
    assert kernels.graph_nodes(text) == 2


def test_twenty_seconds_measure_a_model_that_nobody_measured(tiny_config):
    rows = timing.measure_here(tiny_config(training={"batch": 16}), Step, seconds=1.0)
    assert [row["batch"] for row in rows[:2]] == [2, 8]
    assert all(row["quick"] for row in rows)
    assert 0.3 < timing.fit(rows).step(8)[1] * rows[1]["it_s"] < 3  # other programs may run beside


@pytest.mark.parametrize(("own", "a_picture", "sizes", "most"), [
    (256, 1e-4, [2, 8, 32, 128, 256], 20), (256, 0.08, [2, 8, 16], 22), (24, 0.3, [2, 8], 25), (1, 0.1, [1, 2], 10),
    (64, 3.0, [2, 4], 91)])  # the last cannot be measured in less: two steps to warm up, two to measure, at each size
def test_twenty_seconds_are_kept_on_slow_machines(tiny_config, monkeypatch, own, a_picture, sizes, most):
    """A clock that only the steps move: 0.05 s a step and so much a picture, 5 s more for the first."""
    now = [0.0]

    def pulses(c, _):
        for extra in itertools.chain([5.0], itertools.repeat(0.0)):
            now[0] += (seconds := 0.05 + a_picture * c.training.batch + extra)
            yield seconds

    monkeypatch.setattr(timing, "pulses", pulses)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    rows = timing.measure_here(tiny_config(training={"batch": own}), Step)
    assert [row["batch"] for row in rows] == sizes
    assert now[0] - 5 * len(rows) < most
    assert timing.fit(rows).step(256)[1] == pytest.approx(0.05 + 256 * a_picture)


def test_machines_have_file_names():
    cpu = {**KIND, "name": "AMD EPYC 9B14 (R)"}
    assert timing.machine_name(cpu) == "amd-epyc-9b14-2-threads"
    assert timing.machine_name({**cpu, "kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    metal = {**cpu, "kind": "metal", "name": "Apple M1 Max", "gpu_cores": 32}
    assert timing.machine_name(metal) == "apple-m1-max-32-cores"


@pytest.mark.parametrize("masks", [1, 2])
def test_the_torch_step_has_the_same_loss(masks):
    torch = pytest.importorskip("torch")
    import torch_step

    base = throughput.model_config("32x2:1,2/2", "fp32")
    c = base.model_copy(update={"masking": base.masking.model_copy(update={"masks_per_image": masks})})
    model = HJEPA(c, (0.5,) * 3, (0.25,) * 3)
    encoder, predictor = model.init()
    target = {name: w + 0.01 for name, w in encoder.items()}
    images = mx.array(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    patches, (seen, wanted) = model.prepare(images, key_of(0, 1)), model.masks(4, key_of(0, 2))
    guess = model.predict(encoder, predictor, patches, seen, wanted, None)
    ours = float(smooth_l1(guess, model.at_targets(model.targets(target, patches), wanted)).mean())

    other = torch_step.HJepa(c)
    for module, weights in ((other.encoder, encoder), (other.target, target), (other.predictor, predictor)):
        module.load_state_dict({n: torch.from_numpy(np.array(w.T if w.ndim == 2 else w)) for n, w in weights.items()})
    seen, wanted = (torch.from_numpy(np.array(index)).long() for index in (seen, wanted))
    theirs = float(other.loss(torch.from_numpy(np.array(patches)), seen, wanted).detach())
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_the_torch_side_draws_masks_and_pictures_as_ours():
    torch = pytest.importorskip("torch")
    import torch_step

    c = throughput.model_config("32x2:1,2", "fp32")
    model = torch_step.HJepa(c)
    seen, wanted = model.draw(64, torch.device("cpu"))
    assert (seen.shape, wanted.shape) == ((64, 28), (64, 28))
    assert all(len({*a.tolist(), *b.tolist()}) == 56 for a, b in zip(seen, wanted, strict=True))
    flat = torch.full((8, 32, 32, 3), 200, dtype=torch.uint8)
    patches = model.prepare(flat)
    assert patches.shape == (8, 64, 48)
    assert torch.allclose(patches, torch.full_like(patches, (200 / 255 - 0.5) / 0.25), atol=1e-4)
    step = torch_step.Step(timing.with_batch(c, 4), "fp32", "cpu", "eager")
    before = [p.clone() for p in step.model.target.parameters()]
    assert step.run(2) > 0
    assert any((a != b).any() for a, b in zip(before, step.model.target.parameters(), strict=True))
