"""Write files that describe a training to people: a plot of its loss, and the versions of its packages."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path


def loss_curve(history: Sequence[Mapping[str, float]], target: Path) -> Path:
    """Plot the loss of each step and of each evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    return target


def environment(target: Path) -> Path:
    """Write the versions of Python, the operating system and all packages as JSON."""
    packages = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}
    info = {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
    target.write_text(json.dumps(info, indent=2))
    return target
