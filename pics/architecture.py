"""Draws pics/architecture.png: `make pics`."""

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GREY = "#1f2933", "#7b8794"
COLOURS = {"http": "#d9e8fb", "engine": "#fde8c8", "model": "#d8f0dc", "page": "#f6d5d5"}
REQUESTS = ["#4c78a8", "#f58518", "#54a24b"]


def box(ax, x, y, width, height, title, lines, colour):
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.06,rounding_size=0.12", fc=colour, ec=INK, lw=1)
    )
    ax.text(x + 0.12, y + height - 0.1, title, va="top", fontsize=10.5, weight="bold", color=INK)
    ax.text(x + 0.12, y + height - 0.48, "\n".join(lines), va="top", fontsize=8.6, color=INK, linespacing=1.45)


def arrow(ax, start, end, label="", curve=0.0, at=(0, 0)):
    style = f"arc3,rad={curve}"
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.2, connectionstyle=style))
    if label:
        x, y = (start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1]
        ax.text(x, y, label, fontsize=8.2, color=INK, ha="center", va="center")


def pages(ax, x, y):
    """Three requests, their page tables, and the pages that they own."""
    ax.text(x, y + 1.12, "page tables", fontsize=8.6, color=GREY)
    tables = [[2, 5, 6], [0, 1, 3, 8], [4]]
    owner = {page: i for i, table in enumerate(tables) for page in table}
    for i, table in enumerate(tables):
        ax.text(x, y + 0.86 - 0.3 * i, f"request {i + 1}", fontsize=8, color=REQUESTS[i], va="center")
        for j, page in enumerate(table):
            ax.add_patch(Rectangle((x + 1.0 + 0.3 * j, y + 0.73 - 0.3 * i), 0.27, 0.25, fc="white", ec=REQUESTS[i]))
            ax.text(x + 1.135 + 0.3 * j, y + 0.855 - 0.3 * i, str(page), fontsize=7.5, ha="center", va="center")
    x += 2.5
    ax.text(x, y + 1.12, "pages of K and V, 16 tokens each", fontsize=8.6, color=GREY)
    for page in range(11):
        colour = REQUESTS[owner[page]] if page in owner else "white"
        ax.add_patch(Rectangle((x + 0.26 * page, y + 0.25), 0.24, 0.6, fc=colour, ec=GREY, alpha=0.85))
        ax.text(x + 0.12 + 0.26 * page, y + 0.55, str(page), fontsize=7, ha="center", va="center")


def main() -> None:
    fig, ax = plt.subplots(figsize=(11, 5.6), dpi=150)
    ax.set(xlim=(0, 11.2), ylim=(0, 5.7))
    ax.axis("off")
    server = ["FastAPI + uvicorn", "checks every field", "chat template, tokens", "", "tokens to text,", "stop strings,"]
    scheduler = ["scheduler: who computes how many", "tokens, under one budget a step", "", "    running: 1 token each"]
    scheduler += ["    new: what is left of the budget", "    out of pages: preempt the youngest", ""]
    model = ["any transformers causal LM,", "all tokens flat in one batch", "", "attention reads and writes pages:"]
    model += ["  FlashInfer on CUDA", "  torch on CPU", "", "sampler: one draw for each request"]
    box(ax, 0.15, 2.75, 2.35, 2.65, "server", [*server, "SSE events"], COLOURS["http"])
    box(ax, 3.55, 2.75, 3.35, 2.65, "engine loop", [*scheduler, "thread, or process of its own"], COLOURS["engine"])
    box(ax, 7.95, 2.75, 3.1, 2.65, "model", model, COLOURS["model"])
    arrow(ax, (2.6, 4.75), (3.45, 4.75), "requests", at=(0, 0.17))
    arrow(ax, (3.45, 3.2), (2.6, 3.2), "tokens", at=(0, 0.17))
    arrow(ax, (7.0, 4.75), (7.85, 4.75), "batch", at=(0, 0.17))
    arrow(ax, (7.85, 3.2), (7.0, 3.2), "tokens", at=(0, 0.17))
    box(ax, 3.55, 0.3, 7.5, 1.75, "", [], COLOURS["page"])
    pages(ax, 5.5, 0.55)
    ax.text(3.7, 1.75, "KV cache", fontsize=10.5, weight="bold", color=INK)
    ax.text(
        3.7, 1.4, "a request owns\nwhole pages,\nanywhere in\nthe pool", fontsize=8.6, color=INK, va="top", linespacing=1.3
    )
    arrow(ax, (5.2, 2.66), (5.2, 2.14))
    arrow(ax, (9.5, 2.14), (9.5, 2.66))
    ax.text(0.2, 1.9, "curl, openai clients, SDKs", fontsize=9.5, weight="bold", color=INK)
    arrow(ax, (1.0, 2.1), (1.0, 2.66))
    arrow(ax, (1.6, 2.66), (1.6, 2.1))
    fig.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main()
