"""What every command line tool shares: logging, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from funasr_mooer.errors import MooerError

EXIT_USER_ERROR = 2  # as argparse's own
EXIT_INTERRUPTED = 130  # 128 + SIGINT
# A full disk, and paths that cannot be written or read there: the user's to mend.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}

Main = Callable[[Sequence[str] | None], int]


def run(main: Main) -> Main:
    """Make ``main(argv) -> exit code`` a well-behaved tool; use it as a decorator.

    A :class:`MooerError`, a full disk and a path that cannot be written become one line on stderr and exit code 2 (with
    its traceback where ``FUNASR_MOOER_DEBUG`` is set), Ctrl-C exit code 130, and a closed pipe (``| head``) a quiet end.
    Any other exception is a defect of ours and keeps its traceback.

    Example::

        @run
        def main(argv: Sequence[str] | None = None) -> int:
            args = parse(argv)
            ...
            return 0

        if __name__ == "__main__":
            sys.exit(main())
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        configure_logging()
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # Python flushes stdout once more at exit; give it a place where that cannot fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (MooerError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
                raise
            if os.environ.get("FUNASR_MOOER_DEBUG"):
                traceback.print_exc()
            print(one_line(error), file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return guarded


def positive(text: str) -> int:
    """A whole number from 1 on, as argparse's ``type``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def one_line(error: BaseException) -> str:
    """``Kind: message``, line breaks folded."""
    return f"{type(error).__name__}: {' '.join(line.strip() for line in str(error).splitlines())}"


def configure_logging() -> None:
    """Log lines with the time to stderr: ours from INFO on rank 0, everything else from WARNING.

    ``FUNASR_MOOER_LOG=DEBUG`` (or another level) changes ours. Handlers that are already there stay.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    rank_0 = os.environ.get("RANK", "0") == "0"
    level = os.environ.get("FUNASR_MOOER_LOG", "INFO" if rank_0 else "WARNING").upper()
    for name in ("funasr_mooer", "__main__"):  # a tool run with python -m logs as __main__
        logging.getLogger(name).setLevel(level)
