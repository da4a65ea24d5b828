"""A comparison's table for LaTeX."""

from __future__ import annotations

from tokenenv.measure.comparison import Comparison, top1_change, tuning

_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def latex(comparison: Comparison) -> str:
    """A ``tabular`` with a row for each method, for the package booktabs.

    There is a column of speed-ups for each batch size that was timed.
    """
    batches = comparison.batches
    heads = [
        "method", "backbone", r"top-1 (\%)", r"change (pp) [95\,\%]", "GMACs", r"saved (\%)",
        *(f"speed-up, batch {batch}" for batch in batches),
    ]  # fmt: skip
    lines = [
        f"% {comparison.model}, {comparison.dense.images} images of {comparison.data}; "
        f"{comparison.counted}",
        r"\begin{tabular}{ll" + "r" * (len(heads) - 2) + "}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
    ]
    for row in comparison.rows:
        cells = [
            escaped(row.what),
            "--" if row.reference else tuning(row.frozen),
            f"{row.top1:.2f}",
            "--" if row.reference else f"${top1_change(row)}$",
            f"{row.gmacs:.4f}",
            f"{row.saved:.1f}",
            *(f"{speed.speedup:.2f}" for speed in row.speeds),
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
