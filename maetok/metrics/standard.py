"""The metrics that a protocol names."""

from collections.abc import Mapping
from importlib import import_module

from maetok.losses import LPIPSLoss
from maetok.metrics.frechet import FrechetDistance
from maetok.metrics.gaussians import Gaussian
from maetok.metrics.inception_score import InceptionScore
from maetok.metrics.metric import Metric
from maetok.metrics.precision_recall import PrecisionRecall
from maetok.metrics.protocols import EvaluationProtocol
from maetok.metrics.similarity import LPIPS, PSNR, SSIM


def protocol_metrics(
    protocol: EvaluationProtocol,
    is_inception: bool = False,
    lpips: LPIPSLoss | None = None,
    reference_moments: Mapping[str, Gaussian] | None = None,
) -> list[Metric]:
    """Return the metrics of a protocol in its order, with its settings.

    Args:
        protocol: names the metrics. A name with a dot is the class path of a metric without arguments.
        is_inception: whether features come from the Inception network.
        lpips: network of LPIPS.
        reference_moments: moments of a reference set, by name of the features.

    Raises:
        ValueError: if the protocol names an unknown metric.
    """
    moments = reference_moments or {}
    known = {
        metric.name: metric
        for metric in (
            FrechetDistance("pool", is_inception, moments.get("pool")),
            FrechetDistance("spatial", is_inception, moments.get("spatial")),
            InceptionScore(protocol.inception_score_split),
            PrecisionRecall(protocol.neighbours),
            PSNR(),
            SSIM(),
            LPIPS(lpips),
        )
    }
    return [known[name] if name in known else load_metric(name) for name in protocol.metrics]


def load_metric(class_path: str) -> Metric:
    """Return an instance of a metric by its class path, such as ``my_module.MyMetric``.

    Raises:
        ValueError: if there is no such class, or it is no :class:`maetok.metrics.metric.Metric`.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no metric {class_path!r}: give the class path of a Metric, my_module.MyMetric") from error
    if not (isinstance(found, type) and issubclass(found, Metric)):
        raise ValueError(f"{class_path} is not a Metric: derive it from maetok.metrics.Metric")
    return found()
