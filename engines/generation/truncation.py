"""Top-k, top-p and min-p as one threshold a row: a token may be drawn when its scaled logit reaches the threshold.

Order: min-p, then top-k of what min-p left, then top-p of what both left, its mass taken over what is left. Tokens
that tie with the last one kept are kept too, so the result does not depend on the order in which a sort met them.
"""

from __future__ import annotations

import torch

NUCLEUS_WIDTHS = (64, 1024)
"""How many of a row's best tokens are looked at for a nucleus before the whole row is sorted. A full sort of a
vocabulary costs some 50 times the first look, and almost every nucleus lies within it."""


def min_p_threshold(scaled: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """(R, V) scaled logits and (R,) min_p -> (R,): the logit whose probability is min_p times the best one's."""
    return scaled.amax(dim=-1) + min_p.log()


def top_k_threshold(scaled: torch.Tensor, top_k: torch.Tensor, largest: int) -> torch.Tensor:
    """(R, V) scaled logits and (R,) top_k, none above ``largest`` -> (R,): each row's top_k-th largest logit."""
    width = min(largest, scaled.shape[1])
    best = scaled.topk(width, dim=-1).values
    return best.gather(1, (top_k.clamp(max=width) - 1).unsqueeze(1)).squeeze(1)


def top_p_threshold(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """(R, V) scaled logits, -inf where ruled out, and (R,) top_p -> (R,): the least likely logit of the nucleus.

    The nucleus is the fewest most likely tokens whose mass reaches top_p. On a device whose results the host would
    have to wait for, every row is sorted in full instead of asking whether a first look was enough.
    """
    vocab = scaled.shape[1]
    if scaled.device.type != "cpu":
        return _nucleus(scaled, scaled.softmax(dim=-1), top_p, vocab)[0]
    threshold = torch.empty_like(top_p)
    probabilities = scaled.softmax(dim=-1)
    open_rows: torch.Tensor | None = None
    for width in (*(width for width in NUCLEUS_WIDTHS if width < vocab), vocab):
        if open_rows is None:
            threshold, members = _nucleus(scaled, probabilities, top_p, width)
            open_rows = (members > width).nonzero().squeeze(1)
        else:
            found, members = _nucleus(scaled[open_rows], probabilities[open_rows], top_p[open_rows], width)
            threshold[open_rows] = found
            open_rows = open_rows[members > width]
        if open_rows.shape[0] == 0:
            break
    return threshold


def _nucleus(
    scaled: torch.Tensor, probabilities: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nucleus' last logit (R,), and its size (R,): ``width + 1`` where the best ``width`` do not hold it."""
    whole = width == scaled.shape[1]
    best, ids = scaled.sort(dim=-1, descending=True) if whole else scaled.topk(width, dim=-1)
    mass = probabilities.gather(1, ids).cumsum(dim=-1)
    before = (mass < top_p.unsqueeze(1)).sum(dim=-1)
    last = before.clamp(max=width - 1).unsqueeze(1)
    return best.gather(1, last).squeeze(1), before + 1
