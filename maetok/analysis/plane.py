"""Pictures of a latent space in the plane, coloured by class: principal components and t-SNE (the paper uses UMAP)."""

import numpy as np

from maetok.analysis.figures import pixels


def principal_components(features: np.ndarray, components: int = 50, seed: int = 0) -> np.ndarray:
    """Return the coordinates of flattened features (n, ...) along their first principal axes.

    Args:
        features: float32 or float64.
        components: largest number of axes.
        seed: seeds the randomised solver, which scikit-learn chooses for large inputs.

    Returns:
        (n, k), k being the least of ``components``, n and the number of features.
    """
    from sklearn.decomposition import PCA

    flat = features.reshape(len(features), -1)
    return PCA(min(components, *flat.shape), random_state=seed).fit_transform(flat)


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return t-SNE coordinates (n, 2) of features (n, d), n >= 3, started from their first principal axes.

    The perplexity is 30, or less for fewer than 91 samples. Source: van der Maaten and Hinton 2008.
    """
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def draw_classes(panels: dict[str, np.ndarray], labels: np.ndarray, side: int = 640) -> np.ndarray:
    """Draw scatter plots side by side, one colour per class, with a legend.

    Args:
        panels: points (n, 2) by title.
        labels: (n,) class indices.
        side: height of the picture and width of a panel in pixels.

    Returns:
        (side, side * number of panels, 3) uint8.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    dpi = 100
    figure = Figure(figsize=(side * len(panels) / dpi, side / dpi), dpi=dpi, layout="constrained")
    classes = np.unique(labels)
    colours = colormaps["tab10" if len(classes) <= 10 else "turbo"].resampled(max(10, len(classes)))
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, label in enumerate(classes):
            axes.scatter(*points[labels == label].T, s=8, color=colours(number), label=str(label), linewidths=0)
        axes.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 20:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", markerscale=2)
    return pixels(figure)
