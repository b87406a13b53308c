"""The one exception that a person sees: what is wrong, why, and what to do about it. Knows nothing else."""


class UserError(ValueError):
    """A mistake that its reader can mend: the command line shows it as one line and exits with code 2.

    The message is one sentence that says what, why and what to do. Our own broken invariants are `assert`s, never this.
    """
