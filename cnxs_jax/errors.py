"""One family of errors: what is wrong, where, how to fix it, and a documented exit code."""

import functools
import pathlib
import re
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


def run_app(main):
    """`absl.app.run(main)` whose mistakes, those of the command line too, are messages."""
    from absl import app

    run_main(functools.partial(app.run, main, flags_parser=parse_flags))


def parse_flags(argv):
    """absl's flags from `argv`; what is left of it. ConfigError instead of absl's exit 1."""
    from absl import flags

    try:
        left = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.keys()  # a file that could not be read raises only here
        return left
    except (AttributeError, KeyError) as error:  # ml_collections: a key that is not there
        name, *hint = re.findall(r"\w[\w ]*\w", str(error))
        where = next((a for a in argv if f".{name}" in a), "command line")
        fix = "keys are those of the config file, e.g. --config.optimizer.learning_rate=1e-4"
        hint = f'. Did you mean "{hint[1]}"?' if len(hint) > 1 else ""
        raise ConfigError(f"the config has no key {name!r}{hint}", where, fix) from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # No such file or variant, a wrong type; the cause stands in the last line.
        cause = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        if missing := re.search(r"\[Errno 2\].*: '(.+\.py)'", cause):
            path = pathlib.Path(missing[1])
            there = [p.name for p in sorted(path.parent.glob("[!_]*.py")) if p.stem != "common"]
            what = f"there is no file {path}.{did_you_mean(path.name, there)}"
            fix = f"recipes there: {', '.join(there)}" if there else "recipes are in configs"
            raise ConfigError(what, "--config", fix) from None
        raise ConfigError(cause, "command line", "see --help") from None


def first_line(error):
    """The first line of an exception's text, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word, choices):
    """` Did you mean "x"?` for the nearest of `choices`, or an empty string."""
    import difflib

    near = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
