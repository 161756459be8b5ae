"""How many visual tokens of an image are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import floor


@dataclass(frozen=True)
class Budget:
    """Tokens per image, or a share of them; neither means all (the unpruned model).

    With `per_tile` the numbers are per crop of an image.
    """

    tokens: int | None = None
    retention: float | None = None
    per_tile: bool = False

    @classmethod
    def parse(cls, value: "int | float | str | Budget") -> "Budget":
        """Read a budget.

        64 or "64" -> tokens; 0.111 or "11.1%" -> retention; "full" -> all tokens;
        "128/tile" -> tokens of every crop.

        Raises:
            ValueError: anything else, a count below 1, a retention outside (0, 1].
        """
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        per_tile = text.endswith("/tile")
        text = text.removesuffix("/tile")
        try:
            if text == "full" and not per_tile:
                return cls()
            if text.endswith("%"):
                budget = cls(retention=float(Decimal(text[:-1]) / 100), per_tile=per_tile)
            elif text.lstrip("+-").isdigit():
                budget = cls(tokens=int(text), per_tile=per_tile)
            else:
                budget = cls(retention=float(text), per_tile=per_tile)
        except (ValueError, InvalidOperation):
            raise ValueError(
                f"budget={value!r} is not understood; give tokens (64), "
                "a retention (11.1% or 0.111), either with /tile for every crop, or full"
            ) from None
        if budget.tokens is not None and budget.tokens < 1:
            raise ValueError(
                f"budget={value!r}: at least 1 visual token must stay; "
                "to remove none use pruner=none"
            )
        if budget.retention is not None and not 0 < budget.retention <= 1:
            raise ValueError(f"budget={value!r}: a retention is above 0 and at most 1 (100%)")
        return budget

    def resolve(self, available: int) -> int:
        """The number of tokens to keep of `available`; a retention rounds half up, to at least 1.

        Raises:
            ValueError: the budget exceeds `available`.
        """
        if self.retention is not None:
            return max(1, floor(self.retention * available + 0.5))
        if self.tokens is None:
            return available
        if self.tokens > available:
            raise ValueError(
                f"budget={self.tokens}: the image has only {available} visual tokens; "
                f"lower the budget to at most {available}"
            )
        return self.tokens

    def of_crops(self, crops: int, size: int, equal: bool = False) -> list[int]:
        """Tokens to keep of each crop of `size`: equal shares; the first get the remainder.

        Args:
            equal: nobody gets the remainder.

        Raises:
            ValueError: a share is below 1.
        """
        if self.per_tile or crops == 1:
            return [self.resolve(size)] * crops
        share, left = divmod(self.resolve(crops * size), crops)
        left = 0 if equal else left
        if not share:
            raise ValueError(
                f"budget={self}: an image has {crops} crops, and at least 1 token of each must stay"
            )
        return [share + (crop < left) for crop in range(crops)]

    def of_sections(self, sizes: Sequence[int]) -> list[int]:
        """Tokens to keep of each section of an image, in proportion to their `sizes`, at least 1.

        Rounding is the last section's.

        Raises:
            ValueError: fewer tokens than sections.
        """
        whole = sum(sizes)
        keep = left = self.resolve(whole)
        if keep < len(sizes):
            raise ValueError(
                f"budget={self}: an image has {len(sizes)} sections, and at least 1 token of each "
                "must stay"
            )
        shares = []
        for number, size in enumerate(sizes[:-1], 1):
            share = max(1, floor(keep * size / whole + 0.5))
            shares.append(min(share, left - (len(sizes) - number)))
            left -= shares[-1]
        return [*shares, left]

    def most(self, available: int) -> int:
        """An upper estimate of the tokens kept of `available`, for any number of crops."""
        if self.tokens is None:
            return self.resolve(available)
        return available if self.per_tile else min(self.tokens, available)

    def of_sequence(self, available: int, crops: int, size: int) -> int:
        """Tokens to keep of `available`, if all crops of an image are ranked together."""
        return crops * self.resolve(size) if self.per_tile else self.resolve(available)

    def __str__(self) -> str:
        unit = "/tile" * self.per_tile
        if self.retention is not None:
            # exact, since it names the cell: 11.45833233% and 11.45833433% are two budgets
            percent = f"{Decimal(repr(self.retention)) * 100:f}"
            return f"{percent.rstrip('0').rstrip('.') if '.' in percent else percent}%{unit}"
        return "full" if self.tokens is None else f"{self.tokens}{unit}"
