"""What a run's model sees, predicts, attends to and tells apart: `mlx-hjepa plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np

from mlx_hjepa.config import Data
from mlx_hjepa.data.augment import augment, resize
from mlx_hjepa.data.dataset import Pictures, load_dataset
from mlx_hjepa.evaluate.features import FrozenEncoder, load, read_weights
from mlx_hjepa.model.hjepa import HJEPA, key_of
from mlx_hjepa.model.vit import EPS, Encoder, Weights, layer_norm, patchify
from mlx_hjepa.plots.curves import training_curves
from mlx_hjepa.run import Run

SHOWN, BANK, POINTS = 8, 256, 1_500
GREY = 128.0


def draw(run: Run, checkpoint: str = "latest", data: Data | None = None,
         say: Callable[[str], None] = print) -> list[Path]:
    """Write curves, masks, predictions, attention and embedding as PNG under the run's `plots`. Returns the files.

    Pictures are the test split's where there is one. Predictions need a predictor, which published weights lack; a run
    whose weights are not here has curves only. Raises UserError as `features.load` and `load_dataset` do.
    """
    folder = run.scored.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    training_curves(run, folder / "curves.png")
    if not (run.published_weights or run.checkpoints.is_dir()):
        say("its weights are not here: the curves alone")
        return [folder / "curves.png"]
    frozen = load(run.folder, checkpoint=checkpoint)
    dataset = load_dataset(data or run.config.data, say=say)
    pictures = dataset.test or dataset.train
    shown, bank = (pictures.read(np.arange(min(len(pictures), n))) for n in (SHOWN, BANK))
    model = HJEPA(run.config, frozen.mean, frozen.std)
    files = [folder / "curves.png", masks(model, shown, folder / "masks.png"),
             attention(frozen, shown, folder / "attention.png")]
    if run.published_weights:
        say("published without a predictor: no picture of predictions")
    else:
        both = read_weights([run.checkpoint(checkpoint, "model.safetensors") / "model.safetensors"])
        files.append(predictions(model, frozen, both, bank, folder / "predictions.png"))
    files.append(embedding(frozen, pictures, dataset.classes, folder / "embedding.png"))
    return files


def masks(model: HJEPA, images: np.ndarray, file: Path) -> Path:
    """Augmented pictures as the step takes them, what the context encoder sees, and what is to be predicted."""
    c, keys = model.config, mx.random.split(key_of(0, 0), 2)
    x = np.array(augment(mx.array(images), c.data.image_size, c.augment, keys[0]))
    seen, wanted = (np.array(i)[:: c.masking.masks_per_image] for i in model.masks(len(images), keys[1]))
    rows = {"augmented": x, "context": only(x, seen, c.model.patch), "predicted": only(x, wanted, c.model.patch)}
    return _grid(rows, file)


def only(images: np.ndarray, tokens: np.ndarray, patch: int) -> np.ndarray:
    """(B, S, S, 3) with all but some tokens' patches grey; tokens (B, k): places in the grid."""
    patches = np.array(patchify(mx.array(images), patch))
    hidden = np.full_like(patches, GREY)
    rows = np.arange(len(images))[:, None]
    hidden[rows, tokens] = patches[rows, tokens]
    return unpatchify(hidden, patch)


def unpatchify(patches: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `vit.patchify`: (B, N, patch * patch * 3) -> (B, S, S, 3)."""
    b, n, _ = patches.shape
    g = round(n**0.5)
    return patches.reshape(b, g, g, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, g * patch, g * patch, 3)


def predictions(model: HJEPA, frozen: FrozenEncoder, both: Weights, images: np.ndarray, file: Path) -> Path:
    """Each predicted token drawn as the patch whose target is nearest to the prediction, among those of all the other
    pictures; beside it the same search with the true target, the best that it can find. Deepest level."""
    c, b = model.config, len(images)
    x = resize(mx.array(images), c.data.image_size)
    pixels = np.array(patchify(x, c.model.patch))
    patches = frozen.patches(mx.array(images))
    seen, wanted = (i[:: c.masking.masks_per_image] for i in model.masks(b, key_of(0, 1)))
    named = [{n.removeprefix(f"{p}."): w for n, w in both.items() if n.startswith(f"{p}.")}
             for p in ("encoder", "predictor")]
    deepest = [level.depth for level in model.levels].index(model.encoder.depth)
    guess = np.array(model.predict(named[0], named[1], patches, seen, wanted, None)[:, :, deepest])
    goal = np.array(layer_norm(model.encoder(frozen.weights, patches, fused=True)[-1]))
    places, context = np.array(wanted), only(np.array(x), np.array(seen), c.model.patch)
    drawn = {"picture": np.array(x)[:SHOWN], "context": context[:SHOWN]}
    for title, values in (("predicted", guess), ("by true targets", goal[np.arange(b)[:, None], places])):
        filled = np.array(patchify(mx.array(context[:SHOWN]), c.model.patch))
        for i in range(len(filled)):
            others = np.arange(b) != i
            found = nearest(values[i], goal[others].reshape(-1, goal.shape[-1]))
            filled[i, places[i]] = pixels[others].reshape(-1, pixels.shape[-1])[found]
        drawn[title] = unpatchify(filled, c.model.patch)
    return _grid(drawn, file)


def nearest(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """The bank's row with the largest cosine to each query, both less the bank's mean: (k, D), (n, D) -> (k,)."""
    a, b = queries - bank.mean(axis=0), bank - bank.mean(axis=0)
    return (a @ (b / (np.linalg.norm(b, axis=1, keepdims=True) + 1e-6)).T).argmax(axis=1)


def attention(frozen: FrozenEncoder, images: np.ndarray, file: Path) -> Path:
    """The last block's attention, mean over heads: what every token receives, and where the middle one looks."""
    probabilities = attention_of(frozen, images).mean(axis=1)
    g, size = frozen.encoder.grid, frozen.config.data.image_size
    middle = g // 2 * g + g // 2
    rows = {"picture": np.array(resize(mx.array(images), size)), "received": probabilities.mean(axis=1),
            "from the middle": probabilities[:, middle]}
    return _grid({title: v if v.ndim == 4 else v.reshape(-1, g, g) for title, v in rows.items()}, file)


def attention_of(frozen: FrozenEncoder, images: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) of the encoder's last block (Vaswani et al. 2017, equation 1): (B, heads, N, N)."""
    last, w = frozen.encoder.depth - 1, frozen.weights
    before = Encoder(frozen.config)
    before.depths = [last]
    patches = frozen.patches(mx.array(images))
    x = before(w, patches, fused=True)[0] if last else before.embed(w, patches)
    y = mx.fast.layer_norm(x, w[f"blocks.{last}.norm1.weight"], w[f"blocks.{last}.norm1.bias"], EPS)
    qkv = mx.addmm(w[f"blocks.{last}.attn.qkv.bias"], y, w[f"blocks.{last}.attn.qkv.weight"])
    b, n, width = qkv.shape
    q, k = (part.reshape(b, n, before.heads, -1).transpose(0, 2, 1, 3) for part in mx.split(qkv, 3, axis=-1)[:2])
    scale = (width // 3 // before.heads) ** -0.5
    return np.array(mx.softmax(q * scale @ k.transpose(0, 1, 3, 2), axis=-1, precise=True))


def embedding(frozen: FrozenEncoder, pictures: Pictures, classes: list[str] | None, file: Path) -> Path:
    """t-SNE (van der Maaten and Hinton 2008) of the levels' features, L2-normalised, after PCA to 50 dimensions."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = np.arange(min(POINTS, len(pictures)))
    z = frozen.select(frozen.extract(pictures, rows), "levels")
    z /= np.linalg.norm(z, axis=1, keepdims=True) + 1e-12
    z = PCA(min(50, *z.shape), random_state=0).fit_transform(z)
    xy = TSNE(perplexity=min(30, (len(z) - 1) / 3), init="pca", random_state=0).fit_transform(z)
    figure, axis = plt.subplots(figsize=(8, 7), constrained_layout=True)
    labels = None if pictures.labels is None else pictures.labels[rows]
    for i, name in enumerate(classes or [] if labels is not None else []):
        x, y = xy[labels == i].T
        axis.scatter(x, y, s=8, color=plt.colormaps["tab20"](i % 20), label=name if i < 20 else None)
    if labels is None:
        axis.scatter(xy[:, 0], xy[:, 1], s=8)
    elif classes and len(classes) <= 20:
        axis.legend(fontsize=8, markerscale=2)
    axis.set(xticks=[], yticks=[], title=f"{len(z):,} pictures, levels, t-SNE: near is alike, distances mean nothing")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def _grid(rows: dict[str, np.ndarray], file: Path) -> Path:
    """Rows of pictures (B, S, S, 3) in 0..255, or of maps (B, g, g)."""
    count = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), count, figsize=(1.3 * count + 0.6, 1.35 * len(rows)), squeeze=False,
                                constrained_layout=True)
    for line, (title, values) in zip(axes, rows.items(), strict=True):
        for axis, value in zip(line, values, strict=True):
            axis.imshow(np.clip(value, 0, 255).astype(np.uint8) if value.ndim == 3 else value, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
