"""``python -m spn4cir COMMAND``: every console command, also where its script is not on the path.

examples:
  python -m spn4cir train --stage 1
  python -m spn4cir eval --split val --ablate
  accelerate launch --num_processes 2 -m spn4cir train --stage 2
"""

import importlib
import sys

COMMANDS = {
    "train": "spn4cir.train_cli:train_command",
    "eval": "spn4cir.eval_cli:evaluate_command",
    "data": "spn4cir.cli:data_command",
    "import": "spn4cir.cli:import_command",
    "index": "spn4cir.index_cli:index_command",
    "search": "spn4cir.search_cli:search_command",
    "demo": "spn4cir.app_cli:demo_command",
    "export": "spn4cir.export_cli:export_command",
    "triplets": "spn4cir.data_gen.make_triplets:main",
}
"""What pyproject.toml installs as ``spn4cir-NAME``."""


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"usage: python -m spn4cir {{{','.join(COMMANDS)}}} [--help] ...\n\n{__doc__}", end="")
        return
    if name not in COMMANDS:
        raise SystemExit(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[name].partition(":")
    sys.argv[:2] = [f"spn4cir-{name}"]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
