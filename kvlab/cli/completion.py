"""``kvlab completion SHELL``: a script that completes subcommands and flags, made from the parsers."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from kvlab.cli.commands import COMMANDS
from kvlab.cli.parser import Parser, subcommands

SHELLS = ("bash", "zsh", "fish")
BASH = """_kvlab() {{
  local words
  case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
    1:*) words="{commands}";;
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
  [ ${{#COMPREPLY[@]}} -gt 0 ] || COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o filenames -F _kvlab kvlab
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab completion``."""
    examples = (
        'eval "$(kvlab completion bash)"                                   in ~/.bashrc',
        'eval "$(kvlab completion zsh)"                                    in ~/.zshrc',
        "kvlab completion fish > ~/.config/fish/completions/kvlab.fish",
    )
    p = Parser("kvlab completion", "Print a script that completes kvlab's subcommands and flags.", examples=examples)
    p.add_argument("shell", choices=SHELLS)
    p.add_argument("--json", action="store_true", help="print the words as JSON, for a shell of another kind")
    return p


def main(argv: Sequence[str]) -> int:
    """Print the script."""
    from kvlab.cli.show import print_json

    args = parser().parse_args(list(argv))
    words = _words()
    if args.json:
        print_json({name: list(flags) for name, flags in words.items()})
    else:
        print(_fish(words) if args.shell == "fish" else _bash(words, zsh=args.shell == "zsh"), end="")
    return 0


def _words() -> dict[str, dict[str, str]]:
    """Of each subcommand: what may follow it -> what that does."""
    found: dict[str, dict[str, str]] = {}
    for name, command in COMMANDS.items():
        make: Callable[[], argparse.ArgumentParser] = import_module(command.module).parser
        whole = make()
        words: dict[str, str] = {}
        for one in (whole, *subcommands(whole).values()):
            for action in one._actions:
                words |= {flag: action.help or "" for flag in action.option_strings if flag.startswith("--")}
                words |= dict.fromkeys(map(str, action.choices or ()), "") if not action.option_strings else {}
        found[name] = words
    return found


def _bash(words: Mapping[str, Mapping[str, str]], *, zsh: bool) -> str:
    cases = "\n".join(f'    *:{name}) words="{" ".join(flags)}";;' for name, flags in words.items())
    script = BASH.format(commands=" ".join(words), cases=cases)
    return f"autoload -U bashcompinit && bashcompinit\n{script}" if zsh else script


def _fish(words: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        f"complete -c kvlab -n __fish_use_subcommand -a {name} -d {_quoted(COMMANDS[name].about)}" for name in words
    ]
    for name, flags in words.items():
        for flag, about in flags.items():
            what = f"-l {flag.removeprefix('--')}" if flag.startswith("--") else f"-a {flag}"
            lines.append(f"complete -c kvlab -n '__fish_seen_subcommand_from {name}' {what} -d {_quoted(about)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    text = text.replace("%(default)s", "").replace("\\", "")
    return "'" + text.replace("'", "\\'") + "'"
