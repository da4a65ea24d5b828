"""The papers that this package reproduces: their protocols and their own numbers, as data."""

from tokenenv.papers.protocol import TIERS, Baseline, Claim, Paper, Study, Tier
from tokenenv.papers.registry import PAPERS, find_paper

__all__ = ["PAPERS", "TIERS", "Baseline", "Claim", "Paper", "Study", "Tier", "find_paper"]
