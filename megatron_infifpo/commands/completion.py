"""Print a script that completes commands and flags in bash or zsh.

    source <(infifpo completion bash)        # or put this line into ~/.bashrc
    source <(infifpo completion zsh)         # into ~/.zshrc

It reads the pages that `--help` prints, so it knows all flags, and their values where there are
few; other words are completed as files.
"""

import argparse
import shlex

from megatron_infifpo.commands.main import COMMANDS, PAGES

SHELLS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}
SCRIPT = r"""
_infifpo() {
  local now=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} page found word
  local inner=@PAGES@/${COMP_WORDS[1]}-${COMP_WORDS[2]}.txt
  page=@PAGES@/${COMP_WORDS[1]}.txt
  [ -f "$inner" ] && page=$inner
  if [ "$COMP_CWORD" -eq 1 ]; then
    found='@COMMANDS@ --help --version'
  elif [ ! -f "$page" ]; then
    found=
  elif [[ $now == -* ]]; then  # all flags: what a line begins with, up to two spaces
    found=$(sed -nE 's/^  (-.*)$/\1/p' "$page" | sed 's/  .*//' | grep -oE -- '--[A-Za-z0-9_-]+')
  elif [[ $before == --* ]]; then  # a flag's values, where they are listed: --flag {one,other}
    found=$(sed -nE "s/^  (-.*[ ,])?$before \{([^}]*)\}.*/\2/p" "$page" | tr , ' ')
  else
    found=$(sed -nE 's/^  \{([^}]*)\}.*/\1/p' "$page" | tr , ' ')
  fi
  COMPREPLY=()
  while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -W "$found" -- "$now")
}
complete -o default -F _infifpo infifpo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=list(SHELLS))


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    script = SCRIPT.replace("@COMMANDS@", " ".join(COMMANDS))
    print(SHELLS[args.shell] + script.replace("@PAGES@", shlex.quote(str(PAGES))).lstrip(), end="")
