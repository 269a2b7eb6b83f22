"""The entry point of the command `lora-bench`, and of `python -m lora_bench`."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """Run the command of this process and return its exit code; a completion is answered without the other imports.

    Ctrl-C during the imports, before `cli.main` handles it, ends the command in the same way.
    """
    try:
        if sys.argv[1:2] == ["__complete"]:
            from lora_bench.completion import print_candidates

            print_candidates(sys.argv[2:])
            return 0
        from lora_bench.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("lora-bench: interrupted", file=sys.stderr)
        return 130
    finally:
        gc.freeze()  # the process ends: a last search for garbage would take up to a second


if __name__ == "__main__":
    raise SystemExit(main())
