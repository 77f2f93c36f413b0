"""A metric from outside the package."""

from maetok.metrics import Batch, Metric, Rows


class BrightnessGap(Metric):
    """Measures how many of 255 levels the samples are brighter than the references, on average."""

    name = "brightness_gap"
    needs = ("images",)

    def reset(self) -> None:
        self.sides = Rows(), Rows("reference images")

    def update(self, batch: Batch) -> None:
        for rows, values in zip(self.sides, (batch.samples, batch.references), strict=True):
            if values:
                rows.append(batch.indices, values["images"].double().mean((1, 2, 3)))

    def compute(self) -> dict[str, float]:
        samples, references = (rows.gather().mean().item() for rows in self.sides)
        return {self.name: samples - references}
