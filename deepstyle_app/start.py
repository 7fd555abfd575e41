"""Where the program begins: it loads what it needs, and says in one line what is missing."""

import sys
import warnings
from typing import NoReturn


def start() -> NoReturn:
    """Run the command with the process's arguments, and end the process."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, as in `main`
    try:
        from .command import main
        from .terminal import leave
    except KeyboardInterrupt:
        sys.stderr.write("deepstyle: interrupted before the painting began\n")
        sys.exit(130)
    except Exception as error:  # a package is missing, or broken
        sys.exit(without_the_command(error))
    leave(main())


def without_the_command(error: Exception) -> str | None:
    """What is said where the command cannot be loaded. What is imported here needs no package itself."""
    from deepstyle_support.messages import print_line, reason

    if "--info" in sys.argv[1:]:
        from .info import page

        print_line(page())
        return None
    if not isinstance(error, ImportError):
        raise error
    missing = isinstance(error, ModuleNotFoundError)
    return f"deepstyle: error: {reason(error)}" + ("" if missing else "; --info shows which package is broken")
