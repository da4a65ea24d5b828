"""What can be done to tokens, for methods of one's own: prune, match, merge, fuse, pack."""

from tokenenv.vit.packing import compact, end_to_end, inverse, pack, take, unpack
from tokenenv.vit.reduction import (
    Match,
    bipartite_match,
    candidates_first,
    fuse,
    highest,
    merge,
    prune,
    strongest,
)

__all__ = [
    "Match",
    "bipartite_match",
    "candidates_first",
    "compact",
    "end_to_end",
    "fuse",
    "highest",
    "inverse",
    "merge",
    "pack",
    "prune",
    "strongest",
    "take",
    "unpack",
]
