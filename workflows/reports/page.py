"""What the HTML reports share: one style, and pictures and plots inside the page, which fetches nothing."""

import base64
import io
from collections.abc import Mapping
from typing import Any

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
STYLE = """
  body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d8dee6 }
  h1, h3 { overflow-wrap: anywhere } h3 { margin: 1.4rem 0 .2rem; font-size: 1rem }
  table { border-collapse: collapse; margin: .8rem 0 } th, td { padding: .25rem .8rem; text-align: left }
  th { border-bottom: 2px solid #aab4c0 } td { border-bottom: 1px solid #e6eaef }
  td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
  .big td { font-size: 1.15rem } .small { font-size: .85rem } .muted { color: #5d6875 } img { max-width: 100% }
  .row { display: flex; gap: 10px; flex-wrap: wrap; margin-bottom: 12px; align-items: flex-start } figure { margin: 0 }
  .tiny { width: 127px } .tiny img { width: 127px; height: 127px; object-fit: contain; background: #f2f4f7 }
  figcaption { font-size: .74rem; line-height: 1.25; color: #4a5563 }
  .two figure { width: calc((100% - 10px) / 2) } .three figure { width: calc((100% - 20px) / 3) }
  .two img, .wide img { width: 100% }
  code { background: #f2f4f7; padding: .1rem .3rem } .url { font-size: .8rem; overflow-wrap: anywhere }
  .number { color: #0b6e4f; font-weight: 600 }
"""


def render(template: str, values: Mapping[str, object]) -> str:
    """A Jinja template's page; whatever comes from the data is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": "{:,}".format, "percentage": percentage}
    return environment.from_string(template).render({"style": STYLE, **values})


def percentage(part: float, whole: float) -> str:
    """A percentage, which is never 0.0% for something."""
    if not whole:
        return "–"
    return "<0.1%" if 0 < part < 0.001 * whole else f"{part / whole:.1%}"


def data_uri(content: bytes, kind: str = "image/jpeg") -> str:
    """A file inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(image: Image.Image, form: str = "JPEG") -> str:
    """A picture as a data URI."""
    sink = io.BytesIO()
    image.convert("RGB").save(sink, form, quality=88)
    return data_uri(sink.getvalue(), f"image/{form.lower()}")


def plot_uri(figure: matplotlib.figure.Figure) -> str:
    """A plot as a data URI; the same plot gives the same bytes."""
    sink = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ovd"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return data_uri(sink.getvalue(), "image/svg+xml")


def new_plot(xlabel: str, ylabel: str, width: float = 5) -> tuple[matplotlib.figure.Figure, Any]:
    """A figure, `width` inches wide, and its axes."""
    figure = matplotlib.figure.Figure(figsize=(width, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    return figure, axes


def plot_histogram(
    counts: Numbers, edges: Numbers, label: str, *, outline: Numbers | None = None, scale: str = "log"
) -> str:
    """Images in each bin.

    Args:
        counts: [N] images in each bin.
        edges: [N + 1] of the bins.
        label: of the axis.
        outline: [N] counts to compare with.
        scale: of the axis: "linear", "log", or "ratio", which is logarithmic too.
    """
    figure, axes = new_plot(label, "images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.stairs(counts, edges, fill=True, color=GREEN, alpha=0.75)
    if outline is not None:
        axes.stairs(outline, edges, color=INK, linewidth=1)
    axes.set_xlim(filled(counts if outline is None else counts + outline, edges))
    if scale != "linear":
        scale_log(axes, "x")
    if scale == "ratio":
        axes.xaxis.set_major_locator(ticker.FixedLocator(list(2.0 ** np.arange(-4, 5))))
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}:1" if ratio >= 1 else f"1:{1 / ratio:g}")
    return plot_uri(figure)


def plot_grid(counts: Numbers, edges: Numbers, xlabel: str, ylabel: str) -> str:
    """Counts [N, N] between edges [N + 1], dark where there are many, on logarithmic axes."""
    figure, axes = new_plot(xlabel, ylabel)
    axes.grid(visible=False)
    scale = matplotlib.colors.LogNorm(1, max(10, counts.max()))
    mesh = axes.pcolormesh(edges, edges, np.where(counts > 0, counts, np.nan).T, cmap="viridis_r", norm=scale)
    figure.colorbar(mesh, label="images", format=ticker.EngFormatter(sep=""))
    axes.set(xlim=filled(counts.sum(1), edges), ylim=filled(counts.sum(0), edges))
    scale_log(axes, "x")
    scale_log(axes, "y")
    return plot_uri(figure)


def filled(counts: Numbers, edges: Numbers, margin: int = 3) -> tuple[float, float]:
    """From where to where bins are not empty, and some bins more on each side."""
    (places,) = np.nonzero(counts)
    return float(edges[max(0, places[0] - margin)]), float(edges[min(len(edges) - 1, places[-1] + 1 + margin)])


def scale_log(axes: Any, name: str) -> None:
    """A logarithmic axis with few round numbers."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.EngFormatter(sep=""))
