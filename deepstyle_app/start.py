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
    except ModuleNotFoundError as missing:
        from deepstyle_support.messages import lacks_package  # which needs no package itself

        sys.exit(f"deepstyle: error: {lacks_package(missing.name)}")
    leave(main())
