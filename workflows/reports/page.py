"""Rendering shared by all HTML reports: one Jinja base page, with images and plots embedded as data URIs."""

import base64
import io
from collections.abc import Mapping
from typing import Any, Literal

import jinja2
import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
import numpy.typing as npt
from matplotlib import ticker
from PIL import Image

Numbers = npt.NDArray[Any]
GREEN, INK = "#0b6e4f", "#1c2430"


Template = Literal["boxes", "classify", "compare", "demo", "evaluation", "failures", "pairs", "predictions"]


def render_page(template: Template, values: Mapping[str, object]) -> str:
    """Render `templates/<template>.html`; all values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workflows.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": "{:,}".format, "percentage": percentage, "data_uri": image_data_uri}
    return environment.get_template(f"{template}.html").render(values)


def percentage(part: float, whole: float) -> str:
    """Format `part / whole` as a percentage; a small part is never shown as 0.0%."""
    if not whole:
        return "–"
    return "<0.1%" if 0 < part < 0.001 * whole else f"{part / whole:.1%}"


def data_uri(content: bytes, mime_type: str = "image/jpeg") -> str:
    """Encode a file as a data URI."""
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


def image_data_uri(image: Image.Image, image_format: Literal["JPEG", "PNG"] = "JPEG") -> str:
    """Encode an image as a data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, image_format, quality=88)
    return data_uri(buffer.getvalue(), f"image/{image_format.lower()}")


def plot_data_uri(figure: matplotlib.figure.Figure) -> str:
    """Encode a plot as an SVG data URI; equal plots give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ovd"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


def new_plot(xlabel: str, ylabel: str, width: float = 5) -> tuple[matplotlib.figure.Figure, Any]:
    """Create a figure `width` inches wide and its axes."""
    figure = matplotlib.figure.Figure(figsize=(width, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    return figure, axes


def plot_histogram(
    counts: Numbers,
    edges: Numbers,
    label: str,
    *,
    outline: Numbers | None = None,
    scale: Literal["linear", "log", "ratio"] = "log",
) -> str:
    """Plot the number of images [N] in bins with edges [N + 1], and other counts [N] as an outline.

    The x axis scale "ratio" is logarithmic with ticks such as 1:2.
    """
    figure, axes = new_plot(label, "images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.stairs(counts, edges, fill=True, color=GREEN, alpha=0.75)
    if outline is not None:
        axes.stairs(outline, edges, color=INK, linewidth=1)
    axes.set_xlim(occupied_range(counts if outline is None else counts + outline, edges))
    if scale != "linear":
        set_log_scale(axes, "x")
    if scale == "ratio":
        axes.xaxis.set_major_locator(ticker.FixedLocator(list(2.0 ** np.arange(-4, 5))))
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}:1" if ratio >= 1 else f"1:{1 / ratio:g}")
    return plot_data_uri(figure)


def plot_heatmap(counts: Numbers, edges: Numbers, xlabel: str, ylabel: str) -> str:
    """Plot counts [N, N] between edges [N + 1] on logarithmic axes; dark cells hold many images."""
    figure, axes = new_plot(xlabel, ylabel)
    axes.grid(visible=False)
    norm = matplotlib.colors.LogNorm(1, max(10, counts.max()))
    mesh = axes.pcolormesh(edges, edges, np.where(counts > 0, counts, np.nan).T, cmap="viridis_r", norm=norm)
    figure.colorbar(mesh, label="images", format=ticker.EngFormatter(sep=""))
    axes.set(xlim=occupied_range(counts.sum(1), edges), ylim=occupied_range(counts.sum(0), edges))
    set_log_scale(axes, "x")
    set_log_scale(axes, "y")
    return plot_data_uri(figure)


def occupied_range(counts: Numbers, edges: Numbers, margin: int = 3) -> tuple[float, float]:
    """The range of the non-empty bins, extended by `margin` bins on each side."""
    (bins,) = np.nonzero(counts)
    return float(edges[max(0, bins[0] - margin)]), float(edges[min(len(edges) - 1, bins[-1] + 1 + margin)])


def set_log_scale(axes: Any, name: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with a few round tick labels."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.EngFormatter(sep=""))
