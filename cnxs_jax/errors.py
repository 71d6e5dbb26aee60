"""One family of errors: what is wrong, where, how to fix it, and a documented exit code."""

import sys

EXIT_CODES = {
    0: "done",
    2: "bad configuration",
    3: "data",
    4: "checkpoint or weights",
    5: "numerics",
    6: "distributed start-up",
    75: "stopped by a signal; the state was saved",
}


class CnxsError(Exception):
    """A mistake that the user can mend. Printed as one message, never as a traceback.

    Args:
        what: what is wrong, with the value that was got and the one that was expected.
        where: the file, config key or argument.
        fix: what to do about it.
    """

    code = 1

    def __init__(self, what, where=None, fix=None):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self):
        where = f" [{self.where}]" if self.where else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{self.what}{where}{fix}"


class ConfigError(CnxsError):
    """Bad configuration or argument (exit code 2)."""

    code = 2


class DataError(CnxsError):
    """Missing or damaged data (exit code 3)."""

    code = 3


class CheckpointError(CnxsError):
    """Missing, damaged, hostile or ill-fitting weights or checkpoints (exit code 4)."""

    code = 4


class NumericsError(CnxsError):
    """Non-finite loss, gradients or output (exit code 5)."""

    code = 5


class DistributedError(CnxsError):
    """A cluster that did not come up (exit code 6)."""

    code = 6


class Stopped(CnxsError):
    """SIGTERM or SIGINT; the state was saved, start again to go on (exit code 75)."""

    code = 75


def run_main(main, *args):
    """Runs `main(*args)` and exits with its error's code, printing one message on stderr."""
    try:
        sys.exit(main(*args))
    except CnxsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


def did_you_mean(word, choices):
    """` Did you mean "x"?` for the nearest of `choices`, or an empty string."""
    import difflib

    near = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
