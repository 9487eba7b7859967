"""Sizes and counts as people write them: 200MB, 1.5GB, 100M, 5.4B, 131072."""

import re
from collections.abc import Sequence

BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_quantity(text: str, units: dict[str, int], name: str) -> int:
    """Read the number that ``text`` means: bytes, parameters or tokens.

    Args:
        text: a number and one of ``units``, in any case, with or without a blank between them; a whole number alone
            where no unit is one of them.
        units: BYTES or COUNTS.
        name: of the setting, for the error.

    Raises:
        ValueError: when it is something else, or not more than 0.
    """
    factors = {unit.lower(): factor for unit, factor in units.items()}
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text.lower())
    number = 0
    if match and match[2] in factors and (match[2] or match[1].isdecimal()):  # alone, 1.5 is a slip
        number = round(float(match[1]) * factors[match[2]])
    if not number:
        *most, last = [unit for unit in units if unit]
        alone = "a whole number, or " if "" in units else ""
        raise ValueError(
            f"{name} is {text!r}; it must be {alone}a number and {', '.join(most)} or {last}, such as 200{most[1]}"
        )
    return number


def written(numbers: Sequence[int], units: dict[str, int]) -> list[str]:
    """Write numbers that are compared: 402.5 kB, 1.3 MB, with as many digits as it takes to tell them apart.

    They are rounded up, so that what is written of a smallest size is enough.

    Args:
        numbers: bytes, parameters or tokens.
        units: BYTES or COUNTS; each number has the largest of them that it reaches, so the smallest is ``kB`` or ``k``.
    """
    factors = [(unit, factor) for unit, factor in units.items() if unit]
    for digits in range(1, 13):
        texts = []
        for number in numbers:
            unit, factor = max((f for f in factors if f[1] <= number), default=factors[0], key=lambda f: f[1])
            texts.append(f"{-(-number * 10**digits // factor) / 10**digits:,.{digits}f} {unit}")
        if len(set(texts)) == len(set(numbers)):
            break
    return texts


def in_millions(number: float) -> str:
    """Write bytes as MB or parameters as M, without the unit: with one decimal, or what tells less than 1 from 0."""
    millions = number / 1e6
    return f"{millions:,.1f}" if millions >= 1 or not millions else f"{millions:.2g}"
