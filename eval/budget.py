"""How many visual tokens of an image may go on."""

from dataclasses import dataclass
from math import floor


@dataclass(frozen=True)
class Budget:
    """Tokens per image, or a share of them; neither means all (the unpruned model)."""

    tokens: int | None = None
    retention: float | None = None

    @classmethod
    def parse(cls, value: "int | float | str | Budget") -> "Budget":
        """64 or "64" -> tokens; 0.111 or "11.1%" -> retention; "full" -> everything.

        Raises:
            ValueError: anything else, a count below 1, a retention outside (0, 1].
        """
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        try:
            if text == "full":
                return cls()
            if text.endswith("%"):
                budget = cls(retention=float(text[:-1]) / 100)
            elif text.lstrip("+-").isdigit():
                budget = cls(tokens=int(text))
            else:
                budget = cls(retention=float(text))
        except ValueError:
            raise ValueError(
                f"budget={value!r} is not understood; give tokens (64), a retention (11.1% or 0.111) or full"
            ) from None
        if budget.tokens is not None and budget.tokens < 1:
            raise ValueError(f"budget={value!r}: at least 1 visual token must stay; to remove none use pruner=none")
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

    def __str__(self) -> str:
        if self.retention is not None:
            return f"{100 * self.retention:g}%"
        return "full" if self.tokens is None else str(self.tokens)
