"""How far people who judge the same things agree, beyond what chance would give. No torch."""

from collections import Counter
from collections.abc import Sequence


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two people's answers, a pair for each thing that both judged (Cohen 1960).

    kappa = (p_o - p_e) / (1 - p_e), where p_o is the share of pairs that are equal, and p_e the share expected were the two
    independent: sum over answers c of (share of c among the first's) (share of c among the second's). 1 is full agreement, 0
    what chance gives. None without pairs, and where both always give the same one answer: then p_e = 1.
    """
    n = len(pairs)
    if n == 0:
        return None
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    # In whole numbers, so that p_e = 1 is told exactly: n p_o and n^2 p_e.
    equal, expected = sum(a == b for a, b in pairs), sum(first[c] * second[c] for c in first)
    return None if expected == n * n else (n * equal - expected) / (n * n - expected)


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for answers without an order; `units` holds the answers to each thing judged (Krippendorff 2004).

    Any number of people, who need not all have judged everything; a thing that fewer than two judged says nothing.
    alpha = 1 - D_o / D_e. D_o is the share of unequal pairs within things, each thing with m answers weighing m:
    (1/n) sum over things of (unequal ordered pairs) / (m - 1). D_e is that of pairs drawn from all n answers together:
    sum over c of n_c (n - n_c) / (n (n - 1)). None without two answers to one thing, and where all answers are the same.
    """
    counts = [Counter(unit) for unit in units if len(unit) >= 2]
    total = Counter[str]()
    for unit in counts:
        total.update(unit)
    n = total.total()
    apart = sum(k * (n - k) for k in total.values())  # n (n - 1) D_e
    if apart == 0:
        return None
    within = sum(sum(k * (unit.total() - k) for k in unit.values()) / (unit.total() - 1) for unit in counts)  # n D_o
    return 1 - within * (n - 1) / apart
