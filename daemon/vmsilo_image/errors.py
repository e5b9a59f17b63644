"""The one error that vmsilo-image shows to the user. Raised anywhere in the package, printed in __main__
only.
"""


class ImageError(Exception):
    """`fact` says what is so, `hint` what to do about it."""

    def __init__(self, fact: str, hint: str | None = None) -> None:
        super().__init__(fact)
        self.fact = fact
        self.hint = hint
