"""Quality over bytes as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvcompile.artifacts import KvcompileError
from kvcompile.evaluation.summary import Summary

PANELS = (
    ("continuation", "kl", "KL to the full cache, text going on"),
    ("quote", "loss", "loss of quotes"),
    ("question", "loss", "loss of answers"),
)
FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse what cannot be drawn, or where it cannot be written, before anything is measured.

    Raises:
        KvcompileError: another format than png, svg or pdf, no such folder, or no matplotlib.
    """
    if path.suffix not in FORMATS:
        raise KvcompileError(f"{path} cannot be drawn: expected a name that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise KvcompileError("a plot needs matplotlib: pip install matplotlib") from None


def plot(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Draw three panels, one line a method, with the full cache as a level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.8), constrained_layout=True)
    methods = list(dict.fromkeys(s.method for s in summaries if s.method != "full cache"))
    colours = dict(zip(methods, [plt.get_cmap("tab20")(i) for i in range(20)] * 4, strict=False))
    for panel, (kind, field, label) in zip(axes, PANELS, strict=True):
        for method in methods:
            points = sorted((s.share, getattr(s.kinds[kind], field)) for s in summaries if s.method == method)
            own, marked = method == "this artifact", method in ("optimal", "this artifact")
            panel.plot(
                *zip(*points, strict=True),
                marker="*" if own else "o",
                markersize=14 if own else 5,
                label=method,
                color=colours[method],
                linewidth=2.6 if marked else 1.2,
                zorder=3 if marked else 2,
            )
        for one in summaries:
            if one.method == "full cache" and field == "loss":
                panel.axhline(one.kinds[kind].loss, color="black", linestyle=":", linewidth=1, label="full cache")
        shares = sorted({round(s.share, 3) for s in summaries if s.method != "full cache"})
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(shares, [f"{share:.1%}" for share in shares], rotation=45)
        panel.minorticks_off()
        panel.set_xlabel("share of the full cache's bytes")
        panel.set_title(label)
        panel.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.suptitle(title)
    partial = path.with_name(f".{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        partial.replace(path)
    except OSError as error:
        raise KvcompileError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)
