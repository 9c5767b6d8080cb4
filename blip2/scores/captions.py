"""BLEU, ROUGE-L and CIDEr-D of captions, as ``coco-caption`` computes them (``pycocoevalcap``).

A caption is a list of tokens, and each image has one caption and several references. The tokenization is the other half
of a published score: see `blip2.scores.tokens`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[str]
Vector = dict[tuple[str, ...], float]

ORDERS = 4
"""Length of the longest n-grams."""
BETA = 1.2
"""ROUGE-L: weight of recall relative to precision."""
SIGMA = 6.0
"""CIDEr-D: standard deviation of the length penalty, in bigrams."""
SMALL, TINY = 1e-9, 1e-15
"""BLEU: added to numerators and denominators to avoid zeros, as in the official program."""


def ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    """The count of each sequence of 1 to `ORDERS` tokens."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, ORDERS + 1)
        for start in range(len(tokens) - length + 1)
    )


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all captions together (Papineni et al., 2002), with the closest reference length."""
    matched, possible = [0] * ORDERS, [0] * ORDERS
    length = wanted = 0
    for caption, own in zip(captions, references, strict=True):
        length += len(caption)
        wanted += min((abs(len(reference) - len(caption)), len(reference)) for reference in own)[1]
        most: Counter[tuple[str, ...]] = Counter()
        for reference in own:
            most |= ngrams(reference)
        for gram, number in ngrams(caption).items():
            matched[len(gram) - 1] += min(number, most[gram])
        for order in range(ORDERS):
            possible[order] += max(0, len(caption) - order)
    found, product = [], 1.0
    for order in range(ORDERS):
        product *= (matched[order] + TINY) / (possible[order] + SMALL)
        found.append(product ** (1 / (order + 1)))
    ratio = (length + TINY) / (wanted + SMALL)
    return [score * math.exp(1 - 1 / ratio) for score in found] if ratio < 1 else found


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """ROUGE-L of each caption (Lin, 2004): from the longest common subsequences, with the best precision and the best
    recall."""
    found = []
    for caption, own in zip(captions, references, strict=True):
        common = [_longest_common(caption, reference) for reference in own]
        # For the official program an empty text is one empty word.
        precision = max(common) / max(len(caption), 1)
        recall = max(number / max(len(reference), 1) for number, reference in zip(common, own, strict=True))
        both = precision * recall
        found.append((1 + BETA**2) * both / (recall + BETA**2 * precision) if both else 0.0)
    return found


def _longest_common(left: Tokens, right: Tokens) -> int:
    lengths = [0] * (len(right) + 1)
    for token in left:
        before = 0
        for place, other in enumerate(right, 1):
            here = lengths[place]
            lengths[place] = before + 1 if token == other else max(here, lengths[place - 1])
            before = here
    return lengths[-1]


def cider(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al., 2015), 0 to 10; "CIDEr" in published tables is the mean.

    Document frequencies come from the references of these images, so scores of different sets are not comparable.
    """
    counted = [[ngrams(reference) for reference in own] for own in references]
    images_with: Counter[tuple[str, ...]] = Counter()
    for own in counted:
        images_with.update(set().union(*own))
    total = math.log(float(len(references))) if references else 0.0
    found = []
    for caption, own in zip(captions, counted, strict=True):
        vectors, norms, length = _weighted(ngrams(caption), images_with, total)
        scores = [0.0] * ORDERS
        for reference in own:
            wanted, wanted_norms, wanted_length = _weighted(reference, images_with, total)
            closeness = math.exp(-((length - wanted_length) ** 2) / (2 * SIGMA**2))
            for order in range(ORDERS):
                product = 0.0
                for gram, weight in vectors[order].items():
                    other = wanted[order].get(gram, 0.0)
                    product += min(weight, other) * other
                if norms[order] and wanted_norms[order]:
                    product /= norms[order] * wanted_norms[order]
                scores[order] += product * closeness
        found.append(10 * sum(scores) / ORDERS / len(own))
    return found


def _weighted(
    counted: Counter[tuple[str, ...]], images_with: Counter[tuple[str, ...]], total: float
) -> tuple[list[Vector], list[float], int]:
    """The tf-idf vector and its norm for each order, and the number of bigrams."""
    vectors: list[Vector] = [{} for _ in range(ORDERS)]
    squares, bigrams = [0.0] * ORDERS, 0
    for gram, number in counted.items():
        order = len(gram) - 1
        weight = number * (total - math.log(max(1.0, images_with[gram])))
        vectors[order][gram] = weight
        squares[order] += weight**2
        bigrams += number if order == 1 else 0
    return vectors, [math.sqrt(square) for square in squares], bigrams
