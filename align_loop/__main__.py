"""The command: ``python -m align_loop [run] +experiment=NAME [key=value ...]``.

Also ``plan`` (what would run, and why), ``show RUN_DIR pairs|answers``, ``recipes``, and ``export-pairs`` and
``import-labels`` (people's labels on the pairs that the loop is least sure of).
"""

from __future__ import annotations

import argparse
import os
import sys

from align_loop.errors import UserError

USAGE = """usage:
  python -m align_loop +experiment=NAME [setting=NAME] [hardware=NAME] [key=value ...]    run a recipe
  python -m align_loop plan +experiment=NAME [...]                                       what would run, and why
  python -m align_loop show RUN_DIR pairs|answers [--iteration I] [--flagged]            page through what was made
  python -m align_loop export-pairs RUN_DIR --iteration I --number N --out FILE          pairs for people to decide
  python -m align_loop import-labels FILE --run RUN_DIR --out FILE.jsonl                 their labels as preferences
  python -m align_loop recipes [NAME]                                                    list them, or explain one"""


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status: 0 only when it is complete, 2 for what the user can mend."""
    _prepare_process()
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"align_loop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("align_loop: interrupted; the same command goes on from the last finished stage", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, rest = (arguments[0], arguments[1:]) if arguments[0] in COMMANDS else ("run", arguments)
    return COMMANDS[command](rest)


def _run(overrides: list[str]) -> int:
    from align_loop.compose import load
    from align_loop.runner import run

    run(*load(overrides))
    return 0


def _plan(overrides: list[str]) -> int:
    from align_loop.compose import load
    from align_loop.runner import plan

    print("\n".join(plan(load(overrides)[0])))
    return 0


def _show(arguments: list[str]) -> int:
    from pathlib import Path

    from align_loop.report.show import print_blocks, show

    parser = argparse.ArgumentParser(prog="python -m align_loop show")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("what", choices=["pairs", "answers"])
    parser.add_argument("--iteration", type=int)
    parser.add_argument("--flagged", action="store_true", help="only pairs that the noise detector flagged")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--page", type=int, default=1)
    given = parser.parse_args(arguments)
    print_blocks(show(given.run_dir, given.what, given.iteration, given.flagged, given.limit, given.page))
    return 0


def _export_pairs(arguments: list[str]) -> int:
    from pathlib import Path

    from align_loop.report.people import export_pairs

    parser = argparse.ArgumentParser(prog="python -m align_loop export-pairs")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument("--number", type=int, required=True, help="how many pairs, the least certain first")
    parser.add_argument("--out", type=Path, required=True, help="a new file, .jsonl or .csv")
    parser.add_argument("--per-prompt", type=int, default=1, help="most pairs of one prompt")
    given = parser.parse_args(arguments)
    count = export_pairs(given.run_dir, given.iteration, given.number, given.out, given.per_prompt)
    print(f"{count} pairs in {given.out}: fill in the column better with 1, 2 or tie, and delete the rows you skip;")
    print(f"then run again with annotator=people annotator.file={given.out} and the former annotator as annotator.base")
    return 0


def _import_labels(arguments: list[str]) -> int:
    from pathlib import Path

    from align_loop.report.people import import_labels

    parser = argparse.ArgumentParser(prog="python -m align_loop import-labels")
    parser.add_argument("file", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="the run whose pairs were exported")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file of preferences")
    given = parser.parse_args(arguments)
    counts = import_labels(given.file, given.run, given.out)
    print(f"{', '.join(f'{number} {what}' for what, number in counts.items())}; written to {given.out}")
    print(f"train on them with setting=local setting.preferences={given.out}")
    return 0


def _recipes(arguments: list[str]) -> int:
    from align_loop.recipes import explain, table

    print(table() if not arguments else "\n\n\n".join(explain(name) for name in arguments))
    return 0


def _prepare_process() -> None:
    """Before torch is imported: threads that wait must not spin beside other processes; nobody is phoned."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a warning at each start of vLLM
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "show": _show,
    "export-pairs": _export_pairs,
    "import-labels": _import_labels,
    "recipes": _recipes,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
