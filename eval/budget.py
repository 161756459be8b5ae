"""How many visual tokens of an image may go on."""

from dataclasses import dataclass
from math import floor


@dataclass(frozen=True)
class Budget:
    """Tokens per image, or a share of them; neither means all (the unpruned model). Per crop instead with `per_tile`."""

    tokens: int | None = None
    retention: float | None = None
    per_tile: bool = False

    @classmethod
    def parse(cls, value: "int | float | str | Budget") -> "Budget":
        """64 or "64" -> tokens; 0.111 or "11.1%" -> retention; "full" -> everything; "128/tile" -> of every crop of an image.

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
                budget = cls(retention=float(text[:-1]) / 100, per_tile=per_tile)
            elif text.lstrip("+-").isdigit():
                budget = cls(tokens=int(text), per_tile=per_tile)
            else:
                budget = cls(retention=float(text), per_tile=per_tile)
        except ValueError:
            raise ValueError(
                f"budget={value!r} is not understood; give tokens (64), a retention (11.1% or 0.111), "
                "either with /tile for every crop, or full"
            ) from None
        if budget.tokens is not None and budget.tokens < 1:
            raise ValueError(
                f"budget={value!r}: at least 1 visual token must stay; to remove none use pruner=none"
            )
        if budget.retention is not None and not 0 < budget.retention <= 1:
            raise ValueError(f"budget={value!r}: a retention lies above 0 and up to 1 (100%)")
        return budget

    def resolve(self, available: int) -> int:
        """The exact number to keep of `available` tokens; a retention rounds half up, at least 1.

        Raises:
            ValueError: more tokens asked for than there are.
        """
        if self.retention is not None:
            return max(1, floor(self.retention * available + 0.5))
        if self.tokens is None:
            return available
        if self.tokens > available:
            raise ValueError(
                f"budget={self.tokens}: the image has only {available} visual tokens; lower the budget to at most {available}"
            )
        return self.tokens

    def of_crops(self, crops: int, size: int) -> list[int]:
        """What to keep of each of an image's crops of `size` tokens: equal shares, the first ones taking what is left over."""
        if self.per_tile or crops == 1:
            return [self.resolve(size)] * crops
        share, left = divmod(self.resolve(crops * size), crops)
        if not share:
            raise ValueError(
                f"budget={self}: an image has {crops} crops, and at least 1 token of each must stay"
            )
        return [share + (crop < left) for crop in range(crops)]

    def most(self, available: int) -> int:
        """About how much stays of an image with so many places, whatever its crops; rather too much than too little."""
        if self.tokens is None:
            return self.resolve(available)
        return available if self.per_tile else min(self.tokens, available)

    def of_sequence(self, available: int, crops: int, size: int) -> int:
        """What to keep of the `available` places of an image of so many crops, ranked together."""
        return crops * self.resolve(size) if self.per_tile else self.resolve(available)

    def __str__(self) -> str:
        unit = "/tile" * self.per_tile
        if self.retention is not None:
            return f"{100 * self.retention:g}%{unit}"
        return "full" if self.tokens is None else f"{self.tokens}{unit}"
