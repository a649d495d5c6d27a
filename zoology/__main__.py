"""`python -m zoology COMMAND`, also installed as `zoology`: the commands by name."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "run a sweep",
    "plot": "redraw the figure of a results directory",
    "compare": "put results beside the published ones",
    "precision_table": "accuracy by precision, of a sweep that ran in several",
    "plots_jrt": "figures of reading order and of reading twice",
    "doctor": "what this machine can run",
    "benchmark": "speed and memory of training",
    "throughput": "speed of prefill and generation",
}


def main() -> None:
    """Hand over to `zoology.<command>`."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        listed = "\n".join(f"  {name:15} {what}" for name, what in COMMANDS.items())
        wanted = sys.argv[1] if len(sys.argv) > 1 else ""
        asked_for_help = wanted in ("", "-h", "--help")
        message = "" if asked_for_help else f"zoology: no command {wanted!r}\n"
        print(f"{message}usage: zoology COMMAND [options]\n{listed}", file=sys.stdout if asked_for_help else sys.stderr)
        raise SystemExit(0 if asked_for_help else 2)
    command = sys.argv.pop(1)
    raise SystemExit(importlib.import_module(f"zoology.{command}").main())


if __name__ == "__main__":
    main()
